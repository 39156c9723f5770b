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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_server.asking import Run
from fl_server.attendance import Attendance
from fl_server.broadcast import Broadcast
from fl_server.checkpoint import load_newest, require_same, restore, save_checkpoint
from fl_server.config_file import save_config
from fl_server.exchange import Exchange, Scalar
from fl_server.handshake import Task, describe, meet, name_faults, with_start
from fl_server.history import History, blank_record, summarise
from fl_server.observer import LogObserver, Observer
from fl_server.scoring import evaluate
from fl_server.settings import ServerSettings
from fl_server.text_scores import require_library
from fl_server.training import train_round
from vblora.errors import RunError
from vblora.files import alone, save_state, write_atomic
from vblora.state import State
from vblora.wire import initial

__all__ = ["run_rounds"]

LOCK = "lock"  # in the run's directory, while a run is at work there


def run_rounds(
    exchange: Exchange,
    settings: ServerSettings,
    observer: Observer | None = None,
    config: Mapping[str, Scalar] | None = None,
) -> dict[str, Any]:
    """Train for `settings.rounds` rounds, or go on where a run stopped.

    Args:
        exchange: reaches the clients.
        settings: of the run.
        observer: told what happens; None logs it.
        config: kept in the run's directory, to go on with; written once nothing refuses the run any more.

    Returns:
        The content of `summary.json`.

    Raises:
        RunError: the directory is taken, in use or holds no run, no client can take part, or a round has no
            usable reply. What is on disk can then be resumed, as it can after a KeyboardInterrupt.
    """
    out = Path(settings.out)
    history = History(out)
    history.check(settings.resume)
    fix = "end that one (flwr stop, of a deployed run), or choose another out"
    with alone(out / LOCK, str(out), "run", fix):
        if settings.resume or history.path.exists():  # another has ended since
            history.check(settings.resume)
        return _run(exchange, settings, observer or LogObserver(), config, history)


def _run(
    exchange: Exchange,
    settings: ServerSettings,
    observer: Observer,
    config: Mapping[str, Scalar] | None,
    history: History,
) -> dict[str, Any]:
    """See `run_rounds`; the directory is ours."""
    out = Path(settings.out)

    # Step 1: who is there, and what do they train together?
    roster = meet(exchange, settings.wait_seconds)
    if len(roster.clients) < settings.quorum:
        raise RunError(
            f"hello: {len(roster.clients)} clients can take part, quorum is {settings.quorum}: "
            f"{name_faults(roster.refused)}"
        )
    task = with_start(describe(exchange, roster, settings.wait_seconds), settings.start)
    _check_task(task, settings)

    # Step 2: the state to go on from. Round 0 trains nothing: it evaluates the state that the seed gives, or
    # the adapter that the run goes on from.
    state = _resume(task, settings, history) if settings.resume else initial(task.blueprint)
    if config is not None:
        save_config(out, config)
    if not settings.resume:  # from here on there is a run
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
                evaluate(run, reference, record)

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


def _check_task(task: Task, settings: ServerSettings) -> None:
    """See before the first round that what is asked for can be had."""
    if settings.freeze_bank and task.blueprint.topk_shape is None:
        raise RunError(
            f"freeze-bank is {settings.freeze_bank}, but a {task.blueprint.spec.kind} adapter would have "
            "nothing left to train; leave it out"
        )
    if settings.eval_generate:
        require_library()
        if not task.prompts:
            raise RunError(
                "eval-generate: the held-out texts have no prompts to answer; it needs causal-lm on prompts "
                "with completions"
            )


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
