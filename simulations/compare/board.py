"""What a terminal shows while a comparison is at work."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

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
        self._of = 0  # rounds of a run
        self._live = Live(
            console=console, get_renderable=self._picture, transient=True, auto_refresh=console.is_terminal
        )

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def run_started(self, run: Planned) -> None:
        self._rounds[run.label] = 0
        self._began[run.label] = time.monotonic()

    def round_done(self, run: Planned, number: int) -> None:
        self._rounds[run.label] = number
        self._of = int(run.config["rounds"])
        self._done += 1 / (1 + self._of)

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

    def _picture(self) -> Group:
        """A bar over all runs, and a line for each at work."""
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._runs, completed=self._done, width=20)
        head.add_row(f"{self._ended} of {self._runs} runs", bar, f"{self._left()} left")
        lines = [f"{label}: round {number}/{self._of}" for label, number in self._rounds.items()]
        return Group(head, Text("\n".join(lines)))

    def _left(self) -> str:
        """As long as was thought at first, then by what has been done."""
        gone = time.monotonic() - self._started
        if self._done < 1:
            return duration(max(0.0, self._guess - gone))
        return duration(gone * (self._runs - self._done) / self._done)
