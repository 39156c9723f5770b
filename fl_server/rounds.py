"""The round loop, from the first hello to the finished adapter. Knows nothing of Flower: see `exchange.py`.

What is on disk at any moment is a run that can be resumed: the line of a round in the history is written
before its checkpoint, and the newest readable checkpoint decides where a run goes on. Sampling depends on the
seed and the round alone, sums depend on the set of replies, not on their order: an interrupted run ends in
the same bits as one that was left alone.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_server.aggregate import Mean
from fl_server.broadcast import Broadcast
from fl_server.checkpoint import load_newest, require_same, restore, save_checkpoint
from fl_server.evaluation import ShardSums, add_shards, shard_requests
from fl_server.exchange import NEED_STATE, Exchange, Reply, Request, Scalar, client_order
from fl_server.handshake import Fault, Task, describe, meet, name_faults
from fl_server.history import History, Record, RejectedReply, blank_record, summarise
from fl_server.observer import LogObserver, Observer
from fl_server.settings import ServerSettings
from vblora.errors import RunError, UpdateError, WireError
from vblora.files import save_state, write_atomic
from vblora.frame import section_bytes
from vblora.spec import Blueprint
from vblora.state import State, Update, check_update
from vblora.wire import decode_update, initial

__all__ = ["run_rounds", "sample_clients"]

MAX_REASON = 500  # characters kept of why a reply was rejected: a blob may hold long names


@dataclass(frozen=True)
class _Run:
    """What does not change during a run."""

    name: str
    exchange: Exchange
    settings: ServerSettings
    observer: Observer
    task: Task
    clients: tuple[str, ...]


def run_rounds(
    exchange: Exchange, settings: ServerSettings, observer: Observer | None = None
) -> dict[str, Any]:
    """Train for `settings.rounds` rounds, or go on where a run stopped.

    Returns:
        The content of `summary.json`.

    Raises:
        RunError: the directory is taken or holds no run, no client can take part, or a round has no usable
            reply. What is on disk can then be resumed, as it can after a KeyboardInterrupt.
    """
    out = Path(settings.out)
    observer = observer or LogObserver()
    history = History(out)
    history.check(settings.resume)

    # Step 1: who is there, and what do they train together?
    roster = meet(exchange, settings.wait_seconds)
    task = describe(exchange, roster, settings.wait_seconds)

    # Step 2: the state to go on from. Round 0 trains nothing: it evaluates the state that the seed gives.
    if settings.resume:
        state = _resume(task, settings, history)
    else:
        state = initial(task.blueprint)
        history.create()
    reference = Broadcast(task.blueprint, settings.wire, state)
    name = (restore(out, state, reference) if settings.resume else "") or secrets.token_hex(8)
    run = _Run(name, exchange, settings, observer, task, roster.clients)
    observer.run_started(settings, roster, task, history.records)
    saved = state.version if history.records else None

    try:
        for number in range(len(history.records), settings.rounds + 1):
            started, record = time.monotonic(), blank_record(number)

            # Step 3: sampled clients train from the reference; the mean of their updates is the next one.
            if number > 0:
                _train(run, reference, record)

            # Step 4: how good is it?
            if number % settings.eval_every == 0 or number == settings.rounds:
                _evaluate(run, reference, record)

            # Step 5: the record, then the checkpoint. A record without a checkpoint is dropped on resume.
            record["digest"] = reference.state.digest.hex()
            record["seconds"] = time.monotonic() - started
            history.append(record)
            save_checkpoint(out, run.name, reference)
            saved = number
            observer.round_finished(record)
    except BaseException:
        observer.stopped(saved)
        raise

    summary = summarise(settings, roster, task, history.records)
    save_state(out / "adapter" / "adapter.safetensors", reference.state, task.blueprint)
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def sample_clients(clients: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    """The clients of round `number`, in the order of `clients`: only the seed and the round decide."""
    draws = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(len(clients))
    return [clients[at] for at in sorted(np.argsort(draws, kind="stable")[:count])]


def _resume(task: Task, settings: ServerSettings, history: History) -> State:
    """The newest state on disk, or the initial one before there was any, with the history cut back to it."""
    out = history.path.parent
    newest = load_newest(out)
    if newest is None:
        history.keep(0)
        return initial(task.blueprint)
    state, blueprint = newest
    require_same(blueprint, task.blueprint, out)
    if state.version > settings.rounds:
        raise RunError(
            f"{out}: the run has finished round {state.version}, but rounds is {settings.rounds}; "
            f"resume it with rounds {state.version} or more"
        )
    history.keep(state.version + 1)
    if state.version < settings.rounds:  # finished once, with fewer rounds
        (out / "summary.json").unlink(missing_ok=True)
    return state


def _train(run: _Run, reference: Broadcast, record: Record) -> None:
    """One round of training, after which the reference is the next one. Fills in its part of the record.

    Raises:
        RunError: no reply is usable.
    """
    number, blueprint, traffic = record["round"], run.task.blueprint, record["bytes"]
    names = sample_clients(run.clients, run.settings.clients_per_round, run.settings.seed, number)
    run.observer.round_started(number, names)
    record["clients"] = len(names)
    record["lr_scale"] = run.settings.lr_scale(number)

    config: dict[str, Scalar] = {"round": number, "lr-scale": record["lr_scale"], "run": run.name}
    requests = [Request(name, "train", b"", config) for name in names]
    inbox = _Inbox(names)
    mean = Mean(reference.state, blueprint)
    losses: dict[str, tuple[float, int]] = {}
    faults: list[Fault] = []
    dropped: list[Fault] = []
    for reply in inbox.first_of(_ask(run, reference, requests, inbox)):
        if reply.metrics.get("dropped"):
            dropped.append(Fault(reply.client, reply.text[:MAX_REASON]))
            run.observer.client_dropped(number, reply.client, reply.text[:MAX_REASON])
            continue
        traffic["up"] += len(reply.blob)
        fault = ""
        try:
            update = _read_update(reply, reference.state, blueprint)
            mean.add(update)
        except (WireError, UpdateError) as error:
            fault = str(error)[:MAX_REASON]
            faults.append(Fault(reply.client, fault))
        else:
            reference.acknowledge(reply.client)
            _count_sections(traffic["up_sections"], reply.blob)
            losses[reply.client] = (float(reply.metrics.get("train-loss", math.nan)), update.examples)
        run.observer.reply_received(number, "train", reply.client, fault)

    traffic["down"] = inbox.sent
    traffic["down_per_client"] = round(inbox.sent / len(names))
    record["replies"] = mean.updates
    record["examples"] = mean.examples
    record["train_loss"] = _mean_loss(losses)
    record["missing"] = sorted(inbox.waiting, key=client_order)
    record["ignored"] = inbox.ignored
    record["rejected"] += _rejected(faults)
    record["dropped"] = _rejected(dropped)
    if not mean.updates:
        faults += dropped
        faults += [Fault(name, "no reply in time") for name in record["missing"]]
        raise RunError(
            f"round {number}: no usable reply from {len(names)} clients: {name_faults(_ordered(faults))}; "
            "mend the clients and go on with --resume"
        )
    traffic["up_per_client"] = round(sum(traffic["up_sections"].values()) / mean.updates)
    reference.advance(mean.finish())


def _evaluate(run: _Run, reference: Broadcast, record: Record) -> None:
    """Score the reference on the common test set and fill in the record.

    A shard that fails is left out and named; the score then covers `eval_examples`.
    """
    requests = shard_requests(run.clients, record["round"], run.name)
    inbox = _Inbox(request.client for request in requests)
    shards: dict[str, ShardSums] = {}
    faults: list[Fault] = []
    for reply in inbox.first_of(_ask(run, reference, requests, inbox)):
        record["bytes"]["evaluate"] += len(reply.blob)
        fault = ""
        try:
            shards[reply.client] = ShardSums.read(reply)
        except UpdateError as error:
            fault = str(error)[:MAX_REASON]
            faults.append(Fault(reply.client, fault))
        run.observer.reply_received(record["round"], "evaluate", reply.client, fault)

    record["bytes"]["evaluate"] += inbox.sent
    faults += [Fault(name, "evaluation: no reply in time") for name in inbox.waiting]
    record["rejected"] += _rejected(faults)
    sums = add_shards(shards)
    if sums.examples:
        record["eval_examples"] = sums.examples
        record["eval_loss"] = sums.loss_sum / sums.examples
        accuracy = sums.correct / sums.examples
        record["score"] = accuracy if run.task.metric == "accuracy" else record["eval_loss"]
    elif record["round"] == 0:  # nothing is lost yet: better to tell now than after a night of training
        why = name_faults(_ordered(faults)) or "the test set is empty"
        raise RunError(f"evaluation: no client could evaluate the initial state: {why}")


class _Inbox:
    """Lets through the first reply of every client that was asked, and counts the others.

    Attributes:
        waiting: clients that have not answered.
        ignored: replies that did not count.
        sent: bytes of the states that went down.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.waiting = set(names)
        self.ignored = 0
        self.sent = 0

    def first_of(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        for reply in replies:
            if reply.client in self.waiting:
                self.waiting.remove(reply.client)
                yield reply
            else:
                self.ignored += 1


def _ask(run: _Run, reference: Broadcast, requests: Sequence[Request], inbox: _Inbox) -> Iterator[Reply]:
    """Send the reference to clients, each as it can best read it; who cannot gets it from version 0."""
    asked = {request.client: request for request in requests}
    for _ in range(2):
        sent = [replace(item, blob=reference.blob(name)) for name, item in asked.items()]
        inbox.sent += sum(len(request.blob) for request in sent)
        lost: dict[str, Request] = {}
        for reply in run.exchange.ask(sent, run.settings.timeout_seconds):
            if reply.text == NEED_STATE and reply.client in asked and reference.held.get(reply.client):
                reference.forget(reply.client)
                lost[reply.client] = asked[reply.client]
            else:
                yield reply
        asked = lost
        if not asked:
            return


def _read_update(reply: Reply, state: State, blueprint: Blueprint) -> Update:
    if reply.error:
        raise UpdateError(f"training: {reply.error}")
    if reply.text == NEED_STATE:
        raise UpdateError("training: it could not read the state, not even from version 0")
    update = decode_update(reply.blob, blueprint, state)
    check_update(update, blueprint, state)
    return update


def _count_sections(sizes: dict[str, int], blob: bytes) -> None:
    for name, size in section_bytes(blob).items():
        sizes[name] = sizes.get(name, 0) + size


def _mean_loss(losses: dict[str, tuple[float, int]]) -> float | None:
    """Weighted by examples, added in the order of names; clients that report none are left out."""
    told = [losses[name] for name in sorted(losses, key=client_order) if math.isfinite(losses[name][0])]
    examples = sum(weight for _, weight in told)
    return sum(loss * weight for loss, weight in told) / examples if examples else None


def _ordered(faults: Iterable[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: client_order(fault.client))


def _rejected(faults: Iterable[Fault]) -> list[RejectedReply]:
    return [{"client": fault.client, "reason": fault.reason} for fault in _ordered(faults)]
