"""Speed and memory of a simulation while it runs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from simulations.units import size

__all__ = ["Memory", "Pace", "rate", "resident"]

EVERY = 1.0  # seconds from one look at the memory to the next


class Pace:
    """Clients trained per second; what is no training, such as evaluation, takes no time here.

    Attributes:
        now: of the round at work once it has had replies, before that of the last; 0 at first.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._started = self._last = time.monotonic()
        self._replies = self._all_replies = 0
        self._seconds = 0.0

    def round_started(self) -> None:
        """Clients begin to train."""
        self._started = self._last = time.monotonic()
        self._replies = 0

    def reply_received(self) -> None:
        """One of them is done."""
        now = time.monotonic()
        self._seconds += now - self._last
        self._last = now
        self._replies += 1
        self._all_replies += 1
        self.now = self._replies / max(1e-9, now - self._started)

    @property
    def mean(self) -> float:
        """Over all rounds."""
        return self._all_replies / max(1e-9, self._seconds)


class Memory:
    """Main memory of all processes, and this process's GPU memory, looked at now and then.

    Attributes:
        peak, gpu_peak: the most bytes of each that were seen.
    """

    def __init__(self) -> None:
        self.peak = self.gpu_peak = 0
        self._looked = -EVERY
        self._now = 0

    def look(self) -> None:
        """See how much is taken, unless that was seen just now."""
        if time.monotonic() - self._looked >= EVERY:
            self._looked = time.monotonic()
            self._now, self.gpu_peak = resident(), max(self.gpu_peak, _gpu_peak())
            self.peak = max(self.peak, self._now)

    @property
    def now(self) -> str:
        """Main memory now and the GPU's peak, for people."""
        return _shown(self._now, self.gpu_peak)

    @property
    def most(self) -> str:
        """The most of both that was seen."""
        return _shown(self.peak, self.gpu_peak)


def rate(count: float) -> str:
    """Something per second, for people: three figures, or all where there are more before the point."""
    return f"{count:.3g}" if count < 1000 else f"{count:,.0f}"


def resident() -> int:
    """Bytes of main memory that this process and its helpers hold now.

    Pages that they share count once for each. Where the system does not tell (no /proc), the most that this
    process ever held.
    """
    with suppress(OSError):
        total = _resident_of(os.getpid())
        for helper in multiprocessing.active_children():
            with suppress(OSError):  # it has ended
                total += _resident_of(helper.pid)
        return total
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu_peak() -> int:
    """Bytes that tensors of this process took on its GPU at most, lately; 0 without one.

    `CohortSizer` counts anew when it measures a client, so the time before is left out.
    """
    return torch.cuda.max_memory_allocated()


def _resident_of(process: int | None) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _shown(main: int, gpu: int) -> str:
    return size(main) + (f", GPU {size(gpu)}" if gpu else "")
