"""What a process of clients answers, whoever carries the questions: Flower, a pipe, a call."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence

import numpy as np

from fl_client.memory import Memory
from fl_client.questions import NEED_STATE, Answer, Question
from fl_client.site import OnStep, Site
from vblora.errors import UnknownStateError, WireError
from vblora.frame import read_blob
from vblora.rounding import round_update
from vblora.state import State, Update
from vblora.wire import decode_state, encode_update

__all__ = ["NEED_STATE", "Answer", "Question", "answer"]


def answer(site: Site, questions: Sequence[Question], on_step: OnStep | None = None) -> Iterator[Answer]:
    """Answer questions of one kind, one answer each; training is done in cohorts, the rest one by one.

    Args:
        site: serves all the clients that are asked.
        questions: of one kind and, for training, with one state and config.
        on_step: told the local steps while training.
    """
    kind = questions[0].kind if questions else ""
    if kind == "train":
        yield from _train(site, questions, on_step)
        return
    for question in questions:
        if kind == "evaluate":
            state = _state(site, _memory(site, question), question.blob)
            if state is None:
                yield Answer(question.client, text=NEED_STATE)
                continue
            sums = site.evaluate(state, int(question.config["shard"]), int(question.config["shards"]))
            yield Answer(question.client, metrics=sums)
        elif kind == "hello":
            yield Answer(question.client, text=_hello(site, question.client))
        else:
            yield Answer(question.client, text=site.describe())


def _train(site: Site, questions: Sequence[Question], on_step: OnStep | None) -> Iterator[Answer]:
    asked = questions[0]
    number, memory = int(asked.config["round"]), _memory(site, asked)
    fates = {question.client: site.fate(number, question.client) for question in questions}
    for client, fate in fates.items():
        if fate.dropped:
            yield Answer(client, metrics={"dropped": 1}, text="dropped out (simulated)")
    working = {client: fate.steps for client, fate in fates.items() if not fate.dropped}
    blobs = {question.client: question.blob for question in questions if question.client in working}
    reference = None
    for client, blob in blobs.items():
        state = _state(site, memory, blob)
        if state is None:
            working.pop(client)
            yield Answer(client, text=NEED_STATE)
        reference = reference or state
    if reference is None:
        return
    trained = site.train_clients(
        reference,
        working,
        round_number=number,
        scale=float(asked.config["lr-scale"]),
        frozen=[name for name in str(asked.config.get("frozen", "")).split(",") if name],
        on_step=_limited(asked, on_step),
    )
    for client, result in trained:
        metrics = {"train-loss": result.loss, "examples": result.examples, "steps": result.steps}
        yield Answer(client, _rounded(site, memory, client, reference, result.update), metrics)


def _rounded(site: Site, memory: Memory, client: int, reference: State, update: Update) -> bytes:
    """An update as bytes; what rounding drops of it is kept for the client's next one."""
    wire, turn = site.settings.wire, update.version + 1
    noise = np.random.default_rng((site.settings.data.seed, turn, client + site.salt))
    waiting = memory.waiting(client, update.version) if wire.feedback else {}
    rounded, dropped = round_update(update, reference, wire, waiting, noise)
    if wire.feedback:
        memory.keep_waiting(client, turn, dropped)
    blob = encode_update(rounded, site.blueprint, reference)
    memory.keep_sent(client, blob)
    return blob


def _memory(site: Site, question: Question) -> Memory:
    site.memory.open(str(question.config.get("run", "")))
    return site.memory


def _state(site: Site, memory: Memory, blob: bytes) -> State | None:
    """The state that a blob brings, or None where it builds on one that is not held, or held otherwise.

    Raises:
        WireError: the blob is damaged, or wrong on its own.
    """
    header, _ = read_blob(blob)
    if (known := memory.state(header.digest)) is not None:  # clients of one round get the same state
        return known
    base = memory.state(header.base_digest)
    try:
        state = decode_state(blob, site.blueprint, {} if base is None else {base.digest: base})
    except UnknownStateError:
        return None
    except WireError:
        if not header.base_version:
            raise
        return None
    memory.keep_state(state, site.blueprint)
    return state


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
