"""Who is there for the next round, and how long the run waits for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fl_server.exchange import Exchange
from fl_server.observer import Observer
from vblora.errors import RunError

__all__ = ["Attendance"]

PAUSE = 2.0  # seconds between looks at who is there
TELL_EVERY = 60.0  # seconds between messages while nothing changes


@dataclass
class Attendance:
    """Waits until enough clients are there; gives up after a while, with a run that can be resumed.

    Attributes:
        exchange: knows who is there, and whether waiting can help at all.
        observer: told why the run waits.
        least: clients that a round needs.
        patience: seconds that one round may wait.
        sleep, clock: of this process.
    """

    exchange: Exchange
    observer: Observer
    least: int
    patience: float
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._deadline = self.clock()
        self._told = ("", self.clock())

    def new_round(self) -> None:
        """Begin to count a round's waiting."""
        self._deadline = self.clock() + self.patience

    def gather(self, clients: Sequence[str], number: int) -> list[str]:
        """Those of `clients` that are there now, in their order; waits while they are too few.

        Raises:
            RunError: too few for too long.
        """
        while True:
            there = set(self.exchange.present())
            found = [name for name in clients if name in there]
            if len(found) >= self.least:
                return found
            absent = ", ".join(name for name in clients if name not in there)
            self.wait(
                f"round {number}: {len(found)} of {len(clients)} clients are there, expected "
                f"{self.least}; missing: {absent:.300}"
            )

    def wait(self, why: str, pause: float = PAUSE) -> None:
        """Pause for so many seconds before another try.

        Raises:
            RunError: waiting cannot help, or has lasted too long.
        """
        now = self.clock()
        if not self.exchange.lasting:
            raise RunError(f"{why}; mend the clients and go on with resume=true (fedvb: --resume)")
        if now >= self._deadline:
            raise RunError(
                f"{why}; paused after {self.patience:g} seconds of waiting (wait-seconds): bring the clients "
                "back and go on with resume=true (fedvb: --resume)"
            )
        if why != self._told[0] or now - self._told[1] >= TELL_EVERY:
            self._told = (why, now)
            self.observer.waiting(why, self._deadline - now)
        self.sleep(min(pause, max(0.0, self._deadline - now)))
