"""What a process of clients answers, whoever carries the questions: Flower, a pipe, a call."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fl_client.site import OnStep, Site
from vblora.spec import Blueprint
from vblora.state import State
from vblora.wire import decode_state, encode_update

__all__ = ["Answer", "Question", "answer"]

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Question:
    """What one client is asked.

    Attributes:
        client: its number.
        kind: hello, describe, train or evaluate.
        blob: the reference state, for train and evaluate.
        config: `round` and `lr-scale` to train; `shard` and `shards` to evaluate.
    """

    client: int
    kind: str
    blob: bytes = b""
    config: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What it says: an update blob, numbers, a text, or why there is nothing."""

    client: int
    blob: bytes = b""
    metrics: Mapping[str, int | float] = field(default_factory=dict)
    text: str = ""
    error: str = ""


def answer(site: Site, questions: Sequence[Question], on_step: OnStep | None = None) -> Iterator[Answer]:
    """Answer questions of one kind, one answer each; training is done in cohorts, the rest one by one.

    Args:
        site: serves all the clients that are asked.
        questions: of one kind and, for training, with one blob and config.
        on_step: told the local steps while training.
    """
    kind = questions[0].kind if questions else ""
    if kind == "train":
        yield from _train(site, questions, on_step)
        return
    for question in questions:
        if kind == "evaluate":
            state = _decoded(question.blob, site.blueprint)
            sums = site.evaluate(state, int(question.config["shard"]), int(question.config["shards"]))
            yield Answer(question.client, metrics=sums)
        elif kind == "hello":
            yield Answer(question.client, text=_hello(site, question.client))
        else:
            yield Answer(question.client, text=site.describe())


def _train(site: Site, questions: Sequence[Question], on_step: OnStep | None) -> Iterator[Answer]:
    asked = questions[0]
    number = int(asked.config["round"])
    fates = {question.client: site.fate(number, question.client) for question in questions}
    for client, fate in fates.items():
        if fate.dropped:
            yield Answer(client, error="dropped out (simulated)")
    working = {client: fate.steps for client, fate in fates.items() if not fate.dropped}
    state = _decoded(asked.blob, site.blueprint)
    trained = site.train_clients(
        state, working, round_number=number, scale=float(asked.config["lr-scale"]), on_step=on_step
    )
    for client, result in trained:
        metrics = {"train-loss": result.loss, "examples": result.examples, "steps": result.steps}
        yield Answer(client, encode_update(result.update, site.blueprint), metrics)


def _hello(site: Site, client: int) -> str:
    return json.dumps(
        {
            "fingerprint": site.blueprint.fingerprint.hex(),
            "examples": len(site.parts[client]),
            "versions": site.versions,
        }
    )


@lru_cache(maxsize=1)
def _decoded(blob: bytes, blueprint: Blueprint) -> State:
    """All clients of a round get the same bytes; read them once."""
    return decode_state(blob, blueprint)
