"""Local training of a cohort: C clients in one forward over one frozen base.

Alone is a cohort of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fl_client.batches import Batch, Examples, collate, plan_round
from fl_client.graphs import Graphs
from fl_client.optim import AdamW
from fl_client.passes import Passes
from fl_client.tasks import Task
from vblora.candidates import CHECK_EVERY
from vblora.errors import raise_faults
from vblora.model import AdaptedModel
from vblora.state import State, Update

__all__ = ["Job", "LocalSettings", "OnStep", "Trained", "train_cohort"]

# Called with (steps done, steps in all) of the cohort at work after each step; says True to stop there.
OnStep = Callable[[int, int], bool | None]

# Learning rates of kinds without a bank.
RATES: Mapping[str, float] = {"lora": 4e-3, "ffa-lora": 4e-3, "lora-xs": 8e-3, "uni-lora": 2e-2}


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains in one round.

    Attributes:
        steps: local steps of AdamW; its moments start at zero each round.
        batch_size: texts a step.
        accumulate: pieces that a step's texts are passed in, one after another: less memory, the same step.
        lr_bank, lr_logits, lr_head: learning rates by tensor. The bank's is for rank 4: a step of more rank
            goes further.
        lr_rows: of what a kind without a bank trains; 0 is the kind's own of `RATES`.
        warmup: share of the steps over which the rates rise: Adam's first steps, of a round too, are all
            sign and no size.
        clip_norm: largest gradient norm; 0 is off.
        weight_decay: of AdamW, on kinds without a bank.
        prox: weight of FedProx' pull towards where the client started (arXiv 1812.06127), on all but logits.
        label_mix: slow clients whose labels are not mixed, see `fl_client.mixture`; where the head is
            personal, none is.
    """

    steps: int = 10
    batch_size: int = 16
    accumulate: int = 1
    lr_bank: float = 8e-3
    lr_logits: float = 3e-2
    lr_rows: float = 0.0
    lr_head: float = 4e-2
    warmup: float = 0.25
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    prox: float = 0.0
    label_mix: bool = True

    def __post_init__(self) -> None:
        raise_faults("local training", self._faults())

    def _faults(self) -> Iterator[str]:
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 1)):
            if getattr(self, name) < least:
                key = "local-steps" if name == "steps" else name.replace("_", "-")
                yield f"{key} is {getattr(self, name)}, expected at least {least}"
        for name in ("lr_bank", "lr_logits", "lr_rows", "lr_head"):
            if not 0 <= getattr(self, name) <= 10:
                yield f"{name.replace('_', '-')} is {getattr(self, name)}, expected 0 to 10"
        if not 0 <= self.warmup <= 1:
            yield f"warmup is {self.warmup}, expected 0 to 1"
        if not 0 <= self.clip_norm < float("inf"):
            yield f"clip-norm is {self.clip_norm}, expected 0 (off) or more"
        if not 0 <= self.weight_decay <= 1:
            yield f"weight-decay is {self.weight_decay}, expected 0 to 1"
        if not 0 <= self.prox < float("inf"):
            yield f"prox is {self.prox}, expected 0 (off) or more"

    def rise(self, step: int) -> float:
        """Scale of the rates in a step, counted from 0: rises to 1 over the warm-up."""
        return min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))

    def rates(self, kind: str, scale: float) -> dict[str, float]:
        """Learning rate by tensor name for a kind of adapter, times the round's scale."""
        own = self.lr_rows or RATES.get(kind, 0.0)
        base = {"bank": self.lr_bank, "logits": self.lr_logits, "head": self.lr_head}
        base |= dict.fromkeys(("rows", "cores", "theta"), own)
        return {name: rate * scale for name, rate in base.items()}


@dataclass(frozen=True)
class Job:
    """One client's part of a round.

    Attributes:
        client: its name.
        examples: its training texts.
        seed: names the draw of batches, such as (seed, round, client).
        steps: local steps, where they differ from the settings' (a straggler's).
        start: what it starts from, where it has a part of its own; None is the reference.
        pace: of its learning rates, 0 to 1.
    """

    client: str
    examples: Examples
    seed: tuple[int, ...]
    steps: int | None = None
    start: State | None = None
    pace: float = 1.0


@dataclass(frozen=True)
class Trained:
    """What one client did: its update, against what it started from; mean loss over its steps (nats), steps,
    and texts seen."""

    update: Update
    loss: float
    steps: int
    examples: int


def train_cohort(
    model: AdaptedModel,
    task: Task,
    state: State,
    jobs: Sequence[Job],
    settings: LocalSettings,
    *,
    scale: float = 1.0,
    frozen: Collection[str] = (),
    pad: int = 0,
    graphs: Graphs | None = None,
    on_step: OnStep | None = None,
) -> list[Trained]:
    """Train C clients from one state, side by side; each gets what it would get alone, to float tolerance.

    Args:
        model: the base with the adapter in place; its binding is used and released.
        task: gives the losses.
        state: the reference that clients start from, each with its own parts put in if it has any.
        jobs: one a client.
        settings: the same for all.
        scale: of the learning rates in this round.
        frozen: tensors that stay as they are in this round.
        pad: token id of padding.
        graphs: captured passes to replay; texts are then padded to a few lengths.
        on_step: told the steps; where it says to stop, the updates hold what was done until then.
    """
    plans = [
        plan_round(job.examples, job.steps or settings.steps, settings.batch_size, job.seed) for job in jobs
    ]
    passes = Passes(model, task, graphs)
    collated = partial(collate, pad=pad, device=model.device, length=graphs.length if graphs else int)
    rates = settings.rates(model.blueprint.spec.kind, scale)
    shared = {"head": [tensor.size for tensor in model.blueprint.head]}
    optimiser = AdamW(rates, settings.clip_norm, settings.weight_decay, shared)
    starts = [job.start or state for job in jobs]
    tensors = model.load(*starts)
    start = {name: tensors[name].detach().clone() for name in state.dense} if settings.prox else {}
    steps = max(len(plan) for plan in plans)
    lengths = torch.tensor([len(plan) for plan in plans], device=model.device)
    paces = torch.tensor([job.pace for job in jobs], device=model.device)
    uneven = any(len(plan) != steps or job.pace != 1 for plan, job in zip(plans, jobs, strict=True))
    total = torch.zeros(len(jobs), device=model.device)
    nothing = np.empty(0, np.int64)
    done = steps
    for step in range(steps):
        if step % CHECK_EVERY == 0:
            _make_room(model, tensors, optimiser)
        trained = {name: tensor for name, tensor in tensors.items() if name not in frozen}
        parts = [
            (job.examples, plan[step] if step < len(plan) else nothing)
            for job, plan in zip(jobs, plans, strict=True)
        ]
        pieces = _pieces(parts, settings.accumulate, collated)
        losses, gradients = passes.gradients(tensors, trained, pieces, len(jobs))
        for name in start.keys() & gradients.keys():
            gradients[name] = gradients[name] + settings.prox * (tensors[name].detach() - start[name])
        optimiser.step(trained, gradients, paces * (lengths > step) if uneven else None, settings.rise(step))
        total += losses
        if on_step is not None and on_step(step + 1, steps):
            done = step + 1
            break
    _make_room(model, tensors, optimiser)
    plans = [plan[:done] for plan in plans]
    mean_losses = (total / lengths.clamp(max=done)).tolist()
    updates = _updates(model, tensors, starts, state, [sum(map(len, plan)) for plan in plans])
    return [
        Trained(update, loss, len(plan), update.examples)
        for update, loss, plan in zip(updates, mean_losses, plans, strict=True)
    ]


def _pieces(
    parts: Sequence[tuple[Examples, np.ndarray]], count: int, collated: Callable[..., Batch]
) -> list[Batch]:
    """The batch of C clients in `count` pieces, or in fewer where no client has as many rows."""
    count = min(count, max(len(rows) for _, rows in parts))
    cut = [(examples, np.array_split(rows, count)) for examples, rows in parts]
    return [collated([(examples, rows[at]) for examples, rows in cut]) for at in range(count)]


def _make_room(model: AdaptedModel, tensors: dict[str, Tensor], optimiser: AdamW) -> None:
    for name, values in model.source.growth().items():
        wider = torch.cat([tensors[name].detach(), values.expand(len(tensors[name]), -1)], dim=-1)
        tensors[name] = wider.requires_grad_()
        optimiser.widen(name, len(values))


def _updates(
    model: AdaptedModel,
    tensors: Mapping[str, Tensor],
    starts: Sequence[State],
    state: State,
    examples: Sequence[int],
) -> list[Update]:
    finals = {name: tensors[name].detach().float().cpu().numpy() for name in state.dense}
    selections = model.source.selections(tensors)
    return [
        Update(
            version=state.version,
            reference=state.digest,
            examples=seen,
            dense={name: finals[name][client] - start.dense[name] for name in start.dense},
            topk=selections[client],
        )
        for client, (start, seen) in enumerate(zip(starts, examples, strict=True))
    ]
