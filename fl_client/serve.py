"""What a process of clients answers, whoever carries the questions: Flower, a pipe, a call."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from fl_client.memory import Memory
from fl_client.personal import keep_back, with_part
from fl_client.questions import NEED_STATE, Answer, Question, Scalar
from fl_client.site import OnStep, Site
from vblora.errors import ConfigError, UnknownStateError, WireError
from vblora.frame import read_blob
from vblora.rounding import round_update
from vblora.state import State, Update
from vblora.wire import decode_state, encode_update

__all__ = ["NEED_STATE", "Answer", "Question", "answer"]


def answer(
    site: Site,
    questions: Sequence[Question],
    on_step: OnStep | None = None,
    on_batch: OnStep | None = None,
) -> Iterator[Answer]:
    """Answer questions of one kind, one answer each; training is done in cohorts, the rest one by one.

    Args:
        site: serves all the clients that are asked.
        questions: of one kind and, for training, with one state and config.
        on_step: told the local steps while training.
        on_batch: told the batches while evaluating.

    Raises:
        WireError: there is no such kind of question, or a blob is damaged.
    """
    kind = questions[0].kind if questions else ""
    if kind == "train":
        yield from _train(site, questions, on_step)
    elif kind == "evaluate":
        yield from _evaluate(site, questions, on_batch)
    elif kind in ("hello", "describe"):
        for question in questions:
            text = _hello(site, question.client) if kind == "hello" else site.describe()
            yield Answer(question.client, text=text)
    elif questions:
        raise WireError(f"question: its kind is {kind!r:.40}, expected hello, describe, train or evaluate")


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
    frozen = {name for name in str(asked.config.get("frozen", "")).split(",") if name}
    silent = frozen | site.settings.personal.parts
    starts = {client: _own_state(site, memory, client, reference) for client in working}
    trained = site.train_clients(
        reference,
        working,
        round_number=number,
        scale=float(asked.config["lr-scale"]),
        frozen=frozen,
        on_step=_limited(asked, on_step),
        starts=starts,
    )
    for client, result in trained:
        metrics = {"train-loss": result.loss, "examples": result.examples, "steps": result.steps}
        update = _kept_back(site, memory, client, reference, starts[client], result.update)
        yield Answer(client, _rounded(site, memory, client, reference, update, silent), metrics)


def _evaluate(site: Site, questions: Sequence[Question], on_batch: OnStep | None) -> Iterator[Answer]:
    """Scores on shards of the common held-out texts, and where asked each client's own, in cohorts."""
    states: dict[int, State] = {}
    for question in questions:
        state = _state(site, _memory(site, question), question.blob)
        if state is None:
            yield Answer(question.client, text=NEED_STATE)
        else:
            states[question.client] = state
    asked = {question.client: question.config for question in questions if question.client in states}
    sums = {
        client: site.evaluate(states[client], int(config["shard"]), int(config["shards"]), on_batch)
        for client, config in asked.items()
        if "shards" in config
    }
    own = _own_sums(site, states, asked, sums, on_batch)
    for client, config in asked.items():
        told, why = {**sums.get(client, {}), **own.get(client, {})}, ""
        if count := int(config.get("generate", 0)):
            try:
                told |= site.generate(states[client], count, int(config["shard"]), int(config["shards"]))
            except ConfigError as error:  # no library for the texts: the other scores count all the same
                why = str(error)
        yield Answer(client, metrics=told, text=why)


def _own_sums(
    site: Site,
    states: Mapping[int, State],
    asked: Mapping[int, Mapping[str, Scalar]],
    sums: Mapping[int, Mapping[str, float]],
    on_batch: OnStep | None,
) -> dict[int, dict[str, float]]:
    """Sums over their own texts, of the clients that are asked for them."""
    own = {
        client: _own_state(site, site.memory, client, states[client])
        for client, config in asked.items()
        if config.get("own")
    }
    found: dict[int, Mapping[str, float]] = {}
    for client, state in own.items():  # a site of its own has scored all its texts, if with this state
        scored = client in sums and state is states[client]
        if scored and int(asked[client]["shards"]) == len(site.parts) == 1:
            found[client] = sums[client]
    found.update(site.evaluate_own({client: own[client] for client in own if client not in found}, on_batch))
    return {
        client: {name.replace("eval-", "own-"): value for name, value in its.items()}
        for client, its in found.items()
    }


def _own_state(site: Site, memory: Memory, client: int, reference: State) -> State:
    """What a client trains from and is scored with: the reference, its own parts put in."""
    if not site.settings.personal.parts:
        return reference
    return with_part(reference, memory.personal(client, reference.version))


def _kept_back(
    site: Site, memory: Memory, client: int, reference: State, start: State, update: Update
) -> Update:
    """An update without what is the client's own, which is kept."""
    parts = site.settings.personal.parts
    if not parts:
        return update
    public, part = keep_back(update, start, reference, parts)
    memory.keep_personal(client, update.version + 1, part)
    return public


def _rounded(
    site: Site, memory: Memory, client: int, reference: State, update: Update, silent: Collection[str]
) -> bytes:
    """An update as bytes; what rounding drops of it is kept for the client's next one.

    Of the `silent` sections nothing is sent, not even what waited.
    """
    wire, turn = site.settings.wire, update.version + 1
    noise = np.random.default_rng((site.settings.data.seed, turn, client + site.salt))
    waiting = memory.waiting(client, update.version) if wire.feedback else {}
    waiting = {name: array for name, array in waiting.items() if name not in silent}
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
