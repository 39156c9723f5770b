"""Train many runs, some at a time, each in a process of its own, so that none disturbs the next.

A finished run is left alone, one that was cut off goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from fl_server.config_file import CONFIG_FILE, config_differences, read_config
from fl_server.history import Record
from simulations.compare.protocol import Planned
from simulations.config import Config
from simulations.processes import PATIENCE, end_processes, end_with_parent
from vblora.errors import ConfigError, FedVBError
from vblora.files import write_atomic

__all__ = [
    "MEASURED",
    "Failure",
    "Layout",
    "Watcher",
    "check_existing",
    "is_finished",
    "run_all",
    "start_process",
]

MEASURED = "measured.json"  # beside a summary: what only who ran it can know
POLL = 0.5  # seconds
PRELOADED = [  # what every run imports
    *("__main__", "simulations.simulate", "simulations.compare.probe", "fl_client.deal"),
    *("transformers.modeling_utils", "matplotlib.figure"),
]


@dataclass(frozen=True)
class Layout:
    """How runs share a machine.

    Attributes:
        at_once: runs at a time.
        workers: processes of each, as `--workers`.
        threads: of each process.
    """

    at_once: int
    workers: int
    threads: int


class Watcher(Protocol):
    """Who is told how the runs go."""

    def run_started(self, run: Planned) -> None:
        """A process trains it now."""

    def round_done(self, run: Planned, number: int) -> None:
        """One of its rounds is on disk; round 0 trains nothing."""

    def run_ended(self, run: Planned, error: str) -> None:
        """It is finished, or cannot be."""


@dataclass(frozen=True)
class Failure:
    """A run that could not be finished, and why."""

    run: Planned
    reason: str


def is_finished(run: Planned) -> bool:
    """Whether its summary and what was measured are on disk."""
    return (run.out / "summary.json").is_file() and (run.out / MEASURED).is_file()


def check_existing(runs: Sequence[Planned]) -> None:
    """See that what lies where these runs will be is these runs, begun or finished.

    Raises:
        ConfigError: another run, started with other options.
    """
    for run in runs:
        if (run.out / CONFIG_FILE).is_file():
            kept = read_config(run.out)
            differing = list(config_differences(run.config, kept))
            if kept.get("rounds") != run.config["rounds"]:  # the schedule goes by it
                differing.append(f"rounds is {run.config['rounds']}, the run has {kept.get('rounds')}")
            if differing:
                raise ConfigError(
                    f"{run.out}: {'; '.join(differing)}; compare with what it was started with, or choose "
                    "another --out"
                )


def run_all(runs: Sequence[Planned], layout: Layout, watcher: Watcher) -> list[Failure]:
    """Finish runs; those that are finished are left alone.

    Returns:
        The runs that could not be finished; the others go on.

    Raises:
        KeyboardInterrupt: the processes are ended; what is on disk is gone on with next time.
    """
    waiting = deque(run for run in runs if not is_finished(run))
    active: dict[Connection, tuple[Planned, BaseProcess]] = {}
    failures = []
    try:
        while waiting or active:
            while waiting and len(active) < layout.at_once:
                run = waiting.popleft()
                process, connection = start_process(_train, run.config, layout)
                active[connection] = run, process
                watcher.run_started(run)
            ready = wait(list(active), timeout=POLL)
            for connection in [each for each in active if each in ready]:
                run, process = active[connection]
                told = _received(connection)
                if isinstance(told, int):
                    watcher.round_done(run, told)
                    continue
                del active[connection]
                end_processes([process], PATIENCE)
                watcher.run_ended(run, told)
                if told:
                    failures.append(Failure(run, told))
    finally:
        end_processes([process for _, process in active.values()])
    return failures


def start_process(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Start a process that is given `arguments` and, last, a connection; what it sends comes out of ours.

    It comes from a server that has imported the libraries, once, and used none of them: that takes seconds.
    It may have children of its own. Server and process are deaf to Ctrl-C, and end with this process.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_live, args=(Path.cwd(), target, *arguments, theirs))
    _start_server()
    process.start()
    theirs.close()
    return process, ours


def _start_server() -> None:
    """Start the server of `start_process` with SIGINT blocked, as it and all that comes from it keep it."""
    resource_tracker.ensure_running()  # when it starts it unblocks SIGINT again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _live(folder: Path, target: Callable[..., None], *arguments: Any) -> None:
    """Do the work of a process, deaf to Ctrl-C: whoever started it ends it, and then it cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.chdir(folder)
    try:
        target(*arguments)
    except BrokenPipeError:  # nobody waits for us any more; what is done is on disk
        os._exit(1)


def _received(connection: Connection) -> int | str:
    """The number of a round that is done, or how the run ended: "" or why it could not be finished."""
    try:
        told: int | str = connection.recv()
    except (EOFError, OSError):
        return "its process died; if memory was short, run fewer at once (--at-once 1)"
    return told


def _train(config: Config, layout: Layout, connection: Connection) -> None:
    """The life of a process: one run. One that was begun goes on with as many helpers, for the same bits."""
    import torch

    from simulations.simulate import simulate

    torch.set_num_threads(layout.threads)
    out, teller = Path(str(config["out"])), _Teller(connection)
    begun = (out / "history.jsonl").is_file()
    workers = read_config(out)["workers"] if begun else layout.workers
    try:
        if not (out / "summary.json").is_file():
            simulate({**config, "workers": workers, "resume": begun}, teller, teller.on_step)
        measured = {
            "memory": teller.memory.peak,
            "gpu": teller.memory.gpu_peak,
            "device": torch.cuda.get_device_name() if teller.memory.gpu_peak else "CPU",
            **asdict(layout),
        }
        write_atomic(out / MEASURED, json.dumps(measured) + "\n")
        connection.send("")
    except BrokenPipeError:
        raise
    except FedVBError as error:
        connection.send(str(error) or type(error).__name__)
    except Exception:
        connection.send(traceback.format_exc(limit=-3))


class _Teller:
    """An `Observer` that tells another process which rounds are done, and hears nothing else."""

    def __init__(self, connection: Connection) -> None:
        from simulations.meters import Memory

        self.memory = Memory()
        self._connection = connection

    def on_step(self, done: int, steps: int) -> None:
        """A local step is done."""
        self.memory.look()

    def round_finished(self, record: Record) -> None:
        self.memory.look()
        self._connection.send(record["round"])

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None
