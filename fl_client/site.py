"""One site: a loaded base with the adapter in place, and the texts of the clients that live there.

A deployed site serves one client; a simulation's process serves many virtual ones over the same base.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.batches import Examples, Shape, padding, plan_lengths, shard
from fl_client.cohort import CohortSizer
from fl_client.generating import asked_prompts, generate, references, rows_with_prompts
from fl_client.graphs import Graphs
from fl_client.hazards import Fate
from fl_client.memory import Memory
from fl_client.mixture import label_mixture
from fl_client.scoring import evaluate, evaluate_cohort
from fl_client.settings import SiteSettings
from fl_client.tasks import Task
from fl_client.text_scores import require_libraries, text_sums
from fl_client.train import Job, OnStep, Trained, train_cohort
from vblora.model import AdaptedModel
from vblora.spec import Blueprint
from vblora.state import State

__all__ = ["OnStep", "Site"]


@dataclass(frozen=True)
class Site:
    """What a process holds between messages.

    Attributes:
        settings: what it was opened with.
        model: the base with the adapter in place.
        task: losses and scores.
        train: training texts of all its clients.
        parts: rows of `train` by client.
        test: held-out texts.
        own: rows of `test` by client, for its own score.
        tokenizer: turns generated tokens to text.
        pad: token id of padding.
        sizer: splits clients into cohorts.
        scorer: the same, for their own scores.
        versions: of the libraries and of the data.
        memory: what the clients keep between rounds.
        graphs: captured passes, where they are asked for.
        salt: of the draws of a site with one client, which has number 0 as at every other such site.
    """

    settings: SiteSettings
    model: AdaptedModel
    task: Task
    train: Examples
    parts: tuple[NDArray[np.int64], ...]
    test: Examples
    own: tuple[NDArray[np.int64], ...]
    tokenizer: Any
    pad: int
    sizer: CohortSizer
    scorer: CohortSizer
    versions: dict[str, str]
    memory: Memory
    graphs: Graphs | None = None
    salt: int = 0

    def __post_init__(self) -> None:
        self.settings.personal.check(self.blueprint)

    @property
    def blueprint(self) -> Blueprint:
        return self.model.blueprint

    def describe(self) -> str:
        """JSON that a server starts a run from: blueprint, score, names of model and data."""
        return json.dumps(
            {
                "blueprint": self.blueprint.to_json(),
                "metric": {"name": self.task.metric, "higher_is_better": self.task.metric != "loss"},
                "model": self.settings.model,
                "data": self.settings.data.data,
                "device": str(self.model.device),
                "versions": self.versions,
                "train_examples": len(self.train),
                "test_examples": len(self.test),
                "prompts": 0 if self.blueprint.labels else rows_with_prompts(self.test),
            }
        )

    def fate(self, round_number: int, client: int) -> Fate:
        """Whether a client takes part in a round, and for how many steps."""
        steps = self.settings.local.steps
        return self.settings.hazards.fate(self.settings.data.seed, round_number, client, steps)

    def train_clients(
        self,
        state: State,
        steps: Mapping[int, int],
        *,
        round_number: int,
        scale: float,
        frozen: Collection[str] = (),
        on_step: OnStep | None = None,
        starts: Mapping[int, State] | None = None,
    ) -> Iterator[tuple[int, Trained]]:
        """Train clients from one state, cohort after cohort; yields (client, what it did), in any order.

        The draw of batches depends on (seed, round, client) alone, so the division into cohorts changes no
        result. Clients of much the same work are trained together: that saves padding.

        Args:
            state: the reference.
            steps: local steps by client.
            round_number: names the draw.
            scale: of the learning rates.
            frozen: tensors that stay as they are.
            on_step: told the steps of each cohort.
            starts: states of clients that have a part of their own.
        """
        starts = starts or {}

        def train(clients: Sequence[int]) -> list[Trained]:
            return train_cohort(
                self.model,
                self.task,
                state,
                [self._job(client, steps[client], round_number, starts.get(client)) for client in clients],
                self.settings.local,
                scale=scale,
                frozen=frozen,
                pad=self.pad,
                graphs=self.graphs,
                on_step=on_step,
            )

        shapes = self._shapes(steps, round_number)
        ordered = _by_work(shapes)
        results = self.sizer.run(ordered, train, lambda group: padding([shapes[client] for client in group]))
        yield from zip(ordered, results, strict=True)

    def pace(self, client: int) -> float:
        """Of a client's rates. A head of its own may well learn how often the client meets each label."""
        labels, targets = len(self.blueprint.labels), self.train.targets[self.parts[client]]
        slowed = self.settings.local.label_mix and "head" not in self.settings.personal.parts
        return label_mixture(targets, labels) if slowed and labels > 1 and len(targets) else 1.0

    def by_work(self, clients: Iterable[int], round_number: int) -> list[int]:
        """Clients ordered by what they have to do in a round, most first."""
        fates = {client: self.fate(round_number, client) for client in clients}
        return _by_work(self._shapes({client: fate.steps for client, fate in fates.items()}, round_number))

    def evaluate(
        self, state: State, index: int, shards: int, on_batch: OnStep | None = None
    ) -> dict[str, float]:
        """Sums of the task's metrics over one of `shards` parts of the held-out texts."""
        rows = shard(len(self.test), index, shards)
        texts = self.test.take(rows)
        return evaluate(self.model, self.task, state, texts, pad=self.pad, on_batch=on_batch)

    def evaluate_own(
        self, states: Mapping[int, State], on_batch: OnStep | None = None
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Sums of the task's metrics over each client's own held-out texts, under its own state."""
        lengths = self.test.lengths
        shapes = {client: _as_one_batch(lengths[self.own[client]]) for client in states}

        def score(clients: Sequence[int]) -> list[dict[str, float]]:
            return evaluate_cohort(
                self.model,
                self.task,
                [states[client] for client in clients],
                [self.test.take(self.own[client]) for client in clients],
                pad=self.pad,
                on_batch=on_batch,
            )

        ordered = _by_work(shapes)
        results = self.scorer.run(ordered, score, lambda group: padding([shapes[client] for client in group]))
        yield from zip(ordered, results, strict=True)

    def generate(self, state: State, count: int, index: int, shards: int) -> dict[str, float]:
        """Sums of the scores of greedy answers to one of `shards` parts of `count` held-out prompts.

        Raises:
            ConfigError: a library of the scores is missing.
        """
        require_libraries()
        asked = asked_prompts(self.test, count, self.settings.data.seed)
        mine = [asked[at] for at in shard(len(asked), index, shards)]
        most = int((self.test.lengths - self.test.targets).max(initial=1))  # as the longest reference
        prompts = [item.prompt for item in mine]
        texts = generate(self.model, state, self.tokenizer, prompts, most, self.pad)
        return text_sums(texts, [references(self.tokenizer, self.test, item) for item in mine])

    def _job(self, client: int, steps: int, round_number: int, start: State | None) -> Job:
        examples = self.train.take(self.parts[client])
        return Job(str(client), examples, self._seed(client, round_number), steps, start, self.pace(client))

    def _seed(self, client: int, round_number: int) -> tuple[int, ...]:
        return self.settings.data.seed, round_number, client + self.salt

    def _shapes(self, steps: Mapping[int, int], round_number: int) -> dict[int, Shape]:
        """The batches that each client will train on: rows and longest text, step by step."""
        lengths, shapes = self.train.lengths, {}
        for client, count in steps.items():
            own = lengths[self.parts[client]]
            size, seed = self.settings.local.batch_size, self._seed(client, round_number)
            plan = plan_lengths(own, count, size, seed) if count else []
            rows = [(len(part), own[part].max()) for part in plan]
            shapes[client] = np.array(rows, np.int64).reshape(-1, 2)
        return shapes


def _as_one_batch(lengths: NDArray[np.int64]) -> Shape:
    """The shape of all texts in one batch; of none, no batch."""
    return np.array([(len(lengths), lengths.max())] if len(lengths) else [], np.int64).reshape(-1, 2)


def _by_work(shapes: Mapping[int, Shape]) -> list[int]:
    """Most steps first, then most rows, then most tokens; equals in their order."""
    return sorted(
        shapes,
        key=lambda client: (-len(shapes[client]), *(-shapes[client].sum(axis=0, initial=0)).tolist()),
    )
