"""A run as it is watched on a terminal: one line a round, and below them what goes on now."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fl_server.exchange import Kind
from fl_server.handshake import Roster, Task
from fl_server.history import Record
from fl_server.settings import ServerSettings
from simulations.meters import Memory, Pace, rate
from simulations.units import size

__all__ = ["Display"]

WINDOW = 600.0  # seconds that the time left is estimated from: several rounds, evaluations among them


class Display:
    """An `Observer` that shows rounds, clients and steps; use it as a context manager around the run.

    Where the console is a file or a pipe, only the lines of the rounds are written.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._out = ""
        self._rounds = self._round = 0
        self._clients = self._replies = 0  # of this round
        self._loss = ""
        self._pace, self._memory = Pace(), Memory()
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=WINDOW,
        )
        self._task = self._live.add_task("starting", total=None, now="")

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def measured(self) -> dict[str, str]:
        """Speed and memory, for the closing table."""
        speed = {"clients trained a second": rate(self._pace.mean)} if self._pace.mean else {}
        return {**speed, "memory at most": self._memory.most}

    def on_step(self, done: int, total: int) -> None:
        """A local step of the client or cohort at work."""
        self._show(f"client {self._replies + 1}/{self._clients}  step {done}/{total}", done / total)

    def run_started(
        self, settings: ServerSettings, roster: Roster, task: Task, done: Sequence[Record]
    ) -> None:
        self._rounds, self._out = settings.rounds, settings.out
        for fault in roster.refused:
            self._warn(f"client {fault.client} refused: {fault.reason}")
        if done:
            self._say(f"resumed after round {done[-1]['round']}")
        self._say(
            _row("round", "train loss", task.metric, "up/client", "down/client", "seconds"), style="bold"
        )
        self._round = len(done)
        self._live.update(self._task, total=settings.rounds, completed=max(0, len(done) - 1))
        self._show("evaluating")

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        self._round, self._clients, self._replies = number, len(clients), 0
        self._pace.round_started()
        self._show(f"client 1/{self._clients}")

    def reply_received(self, number: int, kind: Kind, client: str, fault: str, size: int = 0) -> None:
        if fault:
            self._warn(f"round {number}: reply of client {client} rejected: {fault}")
        if kind == "train":
            self._replies += 1
            self._pace.reply_received()
            at_work = self._replies < self._clients
            self._show(f"client {self._replies + 1}/{self._clients}" if at_work else "evaluating")

    def client_dropped(self, number: int, client: str, reason: str) -> None:
        self._clients -= 1
        self._show(f"client {self._replies + 1}/{self._clients}")

    def update_clipped(self, number: int, client: str, cuts: str) -> None:
        self._say(f"round {number}: client {client}: update cut back: {cuts}")

    def waiting(self, why: str, seconds: float) -> None:
        self._say(f"waiting, {seconds:.0f} s more at most: {why}")

    def round_finished(self, record: Record) -> None:
        number, sent, trained = record["round"], record["bytes"], record["round"] > 0
        self._loss = _number(record["train_loss"])
        line = _row(
            f"{number}/{self._rounds}",
            self._loss,
            _number(record["score"]),
            size(sent["up_per_client"]) if trained else "-",
            size(sent["down_per_client"]) if trained else "-",
            f"{record['seconds']:.1f}",
        )
        lost = {"dropped": record["dropped"], "rejected": record["rejected"]}
        self._say(line + "".join(f"  {len(clients)} {how}" for how, clients in lost.items() if clients))
        self._memory.look()
        self._live.update(self._task, completed=number)

    def stopped(self, saved: int | None) -> None:
        self._live.stop()
        saying = "nothing was saved yet"
        if saved is not None:
            saying = f"round {saved} is saved; go on with: fedvb simulate --resume --out {self._out}"
        self._warn(f"stopped: {saying}")

    def _show(self, now: str, part: float = 0.0) -> None:
        """Say what goes on, and move the bar to the share of the rounds that is done."""
        if self._round:
            done = self._round - 1 + min(1.0, (self._replies + part) / max(1, self._clients))
            self._live.update(self._task, completed=done)
        self._memory.look()
        loss = f"  loss {self._loss}" if self._loss.strip("-") else ""
        pace = f"{rate(self._pace.now)} clients/s  " if self._pace.now else ""
        self._live.update(
            self._task,
            description=f"round {self._round}/{self._rounds}",
            now=f"{now}{loss}\n{pace}memory {self._memory.now}",  # a second line, to stay within 80 columns
        )

    def _say(self, line: str, style: str = "") -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def _warn(self, line: str) -> None:
        self._say(line, style="yellow")


def _row(*cells: str) -> str:
    """One line of the table of rounds, within 80 columns."""
    widths = (11, 12, 10, 11, 13, 9)
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
