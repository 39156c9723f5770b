"""Question and answer: what a process of clients is asked and says, whoever carries it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = [
    "NEED_STATE",
    "OWN_KEYS",
    "Answer",
    "Question",
    "Scalar",
    "lone_config",
    "of_lone_site",
    "with_less_time",
]

Scalar = bool | int | float | str
NEED_STATE = "need-state"  # `Answer.text` where a blob builds on a state that the client does not hold

# Options of a site of its own that no run sets: a server names no file there, and no column either, since the
# names of labels leave the site.
ALONE_KEYS = ("text-column", "label-column", "eval-split", "start")

# Options that a site may set for itself: they then win over the run's, which its server chose.
OWN_KEYS = (
    *("model", "device", "dtype", "data", "task", "labels", "max-examples", "eval-examples"),
    *("quantize", "recompute", "checkpointing", "cuda-graphs", "accumulate"),
    *ALONE_KEYS,
)


@dataclass(frozen=True)
class Question:
    """What one client is asked.

    Attributes:
        client: its number.
        kind: hello, describe, train or evaluate.
        blob: the reference state, for train and evaluate.
        config: `round` and `lr-scale` to train, `frozen` where tensors are to be left alone (their names, by
            comma), `seconds` where it has to stop after so many and send what it has; to evaluate `shard` and
            `shards` for a part of the common held-out texts, `own` for those of its own, `generate` for
            answers to so many held-out prompts; `run`, its name, for both.
    """

    client: int
    kind: str
    blob: bytes = b""
    config: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What it says: an update blob, numbers, a text, or why there is nothing.

    A client that takes no part in a round says so with the number "dropped", and in the text why.
    """

    client: int
    blob: bytes = b""
    metrics: Mapping[str, int | float] = field(default_factory=dict)
    text: str = ""
    error: str = ""


def lone_config(run: Mapping[str, Scalar], own: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The config of a site of its own: one client, which fails by itself if at all, and none of the run's
    `ALONE_KEYS`."""
    asked = {name: value for name, value in run.items() if name not in ALONE_KEYS}
    alone: dict[str, Scalar] = {"clients": 1, "partition": "iid", "cohort": 1, "dropout": 0.0}
    return {**asked, **own, **alone, "stragglers": 0.0}


def with_less_time(question: Question, spent: float) -> Question:
    """A question whose seconds, if it has any, began `spent` seconds ago; a step is left in any case."""
    seconds = float(question.config.get("seconds", 0))
    if not seconds:
        return question
    return replace(question, config={**question.config, "seconds": max(1e-3, seconds - spent)})


def of_lone_site(question: Question) -> Question:
    """A question as a site of its own has to take it: it is client 0 of its data, and scores all of them."""
    if question.kind != "evaluate" or "shards" not in question.config:
        return replace(question, client=0)
    return replace(question, client=0, config={**question.config, "shard": 0, "shards": 1})
