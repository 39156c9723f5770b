"""A run as it is watched on a terminal: one line a round, and below them what goes on now."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fl_server.exchange import Kind
from fl_server.handshake import Roster, Task
from fl_server.history import Record
from fl_server.settings import ServerSettings
from simulations.report import size

__all__ = ["Display"]


class Display:
    """An `Observer` that shows rounds, clients and steps; use it as a context manager around the run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rounds = 0
        self._metric = "score"
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )
        self._run = self._live.add_task("rounds", total=None)
        self._round = self._live.add_task("clients", total=None, visible=False)
        self._steps = self._live.add_task("steps", total=None, visible=False)

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def on_step(self, done: int, total: int) -> None:
        """A local step of the client or cohort at work."""
        self._live.update(self._steps, completed=done, total=total, visible=True)

    def run_started(
        self, settings: ServerSettings, roster: Roster, task: Task, done: Sequence[Record]
    ) -> None:
        self._rounds, self._metric = settings.rounds, task.metric
        for fault in roster.refused:
            self._console.print(
                f"client {fault.client} refused: {fault.reason}", style="yellow", markup=False
            )
        if done:
            self._console.print(f"resumed after round {done[-1]['round']}")
        self._live.update(self._run, total=settings.rounds + 1, completed=len(done))

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        self._live.reset(
            self._round, total=len(clients), visible=True, description=f"round {number}, clients"
        )

    def reply_received(self, number: int, kind: Kind, client: str, fault: str) -> None:
        if fault:
            line = f"round {number}: reply of client {client} rejected: {fault}"
            self._console.print(line, style="yellow", markup=False)
        if kind == "train":
            self._live.advance(self._round)

    def round_finished(self, record: Record) -> None:
        self._live.advance(self._run)
        self._live.update(self._steps, visible=False)
        sent = record["bytes"]
        parts = [f"round {record['round']:>3}/{self._rounds}"]
        if record["train_loss"] is not None:
            parts.append(f"train loss {record['train_loss']:.4f}")
        if record["score"] is not None:
            parts.append(f"{self._metric} {record['score']:.4f}")
        if record["round"]:
            parts.append(f"up {size(sent['up_per_client'])}, down {size(sent['down_per_client'])} a client")
        if record["rejected"]:
            parts.append(f"{len(record['rejected'])} rejected")
        self._console.print(
            "  ".join([*parts, f"{record['seconds']:.1f} s"]), highlight=False, soft_wrap=True
        )

    def stopped(self, saved: int | None) -> None:
        self._live.stop()
        saying = "nothing was saved yet" if saved is None else f"round {saved} is saved; go on with --resume"
        self._console.print(f"stopped: {saying}", style="yellow")
