"""What a process of clients answers, whoever carries the questions: Flower, a pipe, a call."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache

from fl_client.questions import Answer, Question
from fl_client.site import OnStep, Site
from vblora.spec import Blueprint
from vblora.state import State
from vblora.wire import decode_state, encode_update

__all__ = ["Answer", "Question", "answer"]


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
        state,
        working,
        round_number=number,
        scale=float(asked.config["lr-scale"]),
        on_step=_limited(asked, on_step),
    )
    for client, result in trained:
        metrics = {"train-loss": result.loss, "examples": result.examples, "steps": result.steps}
        yield Answer(client, encode_update(result.update, site.blueprint), metrics)


def _limited(question: Question, on_step: OnStep | None) -> OnStep | None:
    """`on_step` that stops when the question's seconds are over."""
    seconds = float(question.config.get("seconds", 0))
    if not seconds:
        return on_step
    end = time.monotonic() + seconds

    def told(done: int, steps: int) -> bool:
        stop = on_step is not None and on_step(done, steps)
        return bool(stop) or time.monotonic() >= end

    return told


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
