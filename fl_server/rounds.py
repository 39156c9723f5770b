"""The round loop, from the first hello to the finished adapter. Knows nothing of Flower: see `exchange.py`.

What is on disk at any moment is a run that can be resumed: the line of a round in the history is written
before its checkpoint, and the newest readable checkpoint decides where a run goes on. Sampling depends on the
seed and the round alone, sums depend on the set of replies, not on their order: an interrupted run ends in
the same bits as one that was left alone.
"""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from fl_server.asking import MAX_REASON, Inbox, Run, ask, ordered, rejected
from fl_server.attendance import Attendance
from fl_server.broadcast import Broadcast
from fl_server.checkpoint import load_newest, require_same, restore, save_checkpoint
from fl_server.evaluation import ShardSums, add_shards, evaluation_requests, mean_and_spread
from fl_server.exchange import Exchange, client_order
from fl_server.handshake import Fault, Task, describe, meet, name_faults
from fl_server.history import History, Record, blank_record, summarise
from fl_server.observer import LogObserver, Observer
from fl_server.settings import ServerSettings
from fl_server.training import train_round
from vblora.errors import RunError, UpdateError
from vblora.files import save_state, write_atomic
from vblora.state import State
from vblora.wire import initial

__all__ = ["run_rounds"]


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
    if len(roster.clients) < settings.quorum:
        raise RunError(
            f"hello: {len(roster.clients)} clients can take part, quorum is {settings.quorum}: "
            f"{name_faults(roster.refused)}"
        )
    task = describe(exchange, roster, settings.wait_seconds)
    if settings.freeze_bank and task.blueprint.topk_shape is None:
        raise RunError(
            f"freeze-bank is {settings.freeze_bank}, but a {task.blueprint.spec.kind} adapter would have "
            "nothing left to train; leave it out"
        )

    # Step 2: the state to go on from. Round 0 trains nothing: it evaluates the state that the seed gives.
    if settings.resume:
        state = _resume(task, settings, history)
    else:
        state = initial(task.blueprint)
        history.create()
    reference = Broadcast(task.blueprint, settings.wire, state)
    name = (restore(out, state, reference) if settings.resume else "") or secrets.token_hex(8)
    attendance = Attendance(exchange, observer, settings.quorum, settings.wait_seconds)
    run = Run(name, exchange, settings, observer, task, roster.clients, attendance)
    observer.run_started(settings, roster, task, history.records)
    saved = state.version if history.records else None

    try:
        for number in range(len(history.records), settings.rounds + 1):
            started, record = time.monotonic(), blank_record(number)

            # Step 3: sampled clients train from the reference; the mean of their updates is the next one.
            if number > 0:
                train_round(run, reference, record)

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


def _evaluate(run: Run, reference: Broadcast, record: Record) -> None:
    """Score the reference on the common test set, and clients on their own texts; fill in the record.

    A shard that fails is left out and named; the score then covers `eval_examples`.
    """
    requests = evaluation_requests(_there(run), record["round"], run.name, run.settings.scores_own)
    sharers = {request.client for request in requests if "shards" in request.config}
    inbox = Inbox(request.client for request in requests)
    shards: dict[str, ShardSums] = {}
    own: dict[str, ShardSums] = {}
    faults: list[Fault] = []
    for reply in inbox.first_of(ask(run, reference, requests, inbox)):
        record["bytes"]["evaluate"] += len(reply.blob)
        fault = ""
        try:
            if reply.client in sharers:
                shards[reply.client] = ShardSums.read(reply)
            if run.settings.scores_own:
                own[reply.client] = ShardSums.read(reply, "own")
        except UpdateError as error:
            fault = str(error)[:MAX_REASON]
            faults.append(Fault(reply.client, fault))
        run.observer.reply_received(record["round"], "evaluate", reply.client, fault)

    record["bytes"]["evaluate"] += inbox.sent
    faults += [Fault(name, "evaluation: no reply in time") for name in inbox.waiting]
    record["rejected"] += rejected(faults)
    sums = add_shards(shards)
    if sums.examples:
        record["eval_examples"] = sums.examples
        record["eval_loss"] = sums.score("loss")
        record["score"] = sums.score(run.task.metric)
    elif record["round"] == 0:  # nothing is lost yet: better to tell now than after a night of training
        why = name_faults(ordered(faults)) or "the test set is empty"
        raise RunError(f"evaluation: no client could evaluate the initial state: {why}")
    record["own"] = {
        name: own[name].score(run.task.metric) for name in sorted(own, key=client_order) if own[name].examples
    }
    if run.settings.scores_own and not record["own"] and record["round"] == 0:
        raise RunError(
            "own-scores: no client has held-out texts of its own; the held-out part must have the column "
            "that the training texts are dealt by"
        )
    record["own_mean"], record["own_std"] = mean_and_spread(list(record["own"].values()))


def _there(run: Run) -> list[str]:
    """The clients that can be asked now; all of them where none can, so that their absence is told."""
    present = set(run.exchange.present())
    return [name for name in run.clients if name in present] or list(run.clients)
