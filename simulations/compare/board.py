"""What a terminal shows while a comparison is at work."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from simulations.compare.protocol import Planned
from simulations.units import duration

__all__ = ["Board"]


class Board:
    """A `Watcher`: a line for each run that ended; below them those at work, and the time left.

    Where the console is a file or a pipe, only the lines are written. A context manager around the runs.

    Args:
        console: to write to.
        runs: in all, of this comparison.
        seconds: that they are thought to take.
    """

    def __init__(self, console: Console, runs: int, seconds: float) -> None:
        self._console = console
        self._runs = runs
        self._guess = seconds
        self._ended = 0
        self._started = time.monotonic()
        self._rounds: dict[str, int] = {}  # done here, of the runs at work, by label
        self._began: dict[str, float] = {}
        self._done = 0.0  # of all runs, in runs
        self._live = Progress(
            TextColumn("{task.fields[ended]} of {task.fields[runs]} runs"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[left]} left\n{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("", total=runs, ended=0, runs=runs, left=duration(seconds))

    def __enter__(self) -> Board:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def run_started(self, run: Planned) -> None:
        self._rounds[run.label] = 0
        self._began[run.label] = time.monotonic()
        self._show(run)

    def round_done(self, run: Planned, number: int) -> None:
        self._rounds[run.label] = number
        self._done += 1 / (1 + int(run.config["rounds"]))
        self._show(run)

    def run_ended(self, run: Planned, error: str) -> None:
        self._ended += 1
        self._rounds.pop(run.label)
        took = time.monotonic() - self._began.pop(run.label)
        how = f"not finished: {error}" if error else duration(took)
        self._console.print(
            f"{self._ended:>4}/{self._runs}  {run.label}: {how}",
            style="yellow" if error else "",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        self._show(run)

    def _show(self, run: Planned) -> None:
        rounds = run.config["rounds"]
        at_work = "\n".join(f"{label}: round {number}/{rounds}" for label, number in self._rounds.items())
        self._live.update(
            self._task, completed=self._ended, ended=self._ended, left=self._left(), description=at_work
        )

    def _left(self) -> str:
        """As long as was thought at first, then by what has been done."""
        gone = time.monotonic() - self._started
        if self._done < 1:
            return duration(max(0.0, self._guess - gone))
        return duration(gone * (self._runs - self._done) / self._done)
