"""Ways of training that are timed in turn: by CUDA's events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from vblora.versions import installed_versions

__all__ = ["GIB", "Clock", "Sample", "Way", "describe_machine", "tried"]

GIB = 1 << 30
VERSIONED = ("flwr", "numpy", "peft", "ray", "torch", "transformers")


@dataclass(frozen=True)
class Sample:
    """One repetition of a way.

    Attributes:
        step: seconds of a step, the median of all but the first.
        rest: seconds of what is no step.
        peak: bytes of memory above what was there before; 0 on a CPU.
    """

    step: float
    rest: float
    peak: int


@dataclass(frozen=True)
class Way:
    """One way of training: takes so many steps, tells what they took.

    Attributes:
        name: in the table.
        clients: side by side.
        run: of a number of steps, at least 2.
        own_bytes: that it holds between runs, beside the base.
    """

    name: str
    clients: int
    run: Callable[[int], Sample]
    own_bytes: int = 0


class Clock:
    """Times a run from its own calls after each step. It waits for the device at the ends alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        self._marks = [self._mark()]

    def on_step(self, done: int, steps: int) -> None:
        self._marks.append(self._mark())

    def sample(self) -> Sample:
        self._marks.append(self._mark())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spans = [_seconds(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)]
        step = statistics.median(spans[1:-1])
        on_gpu = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) - self._before if on_gpu else 0
        return Sample(step, spans[0] - step + spans[-1], peak)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _seconds(start: Any, end: Any) -> float:
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)


def tried(way: Way, steps: int, device: torch.device) -> Sample | None:
    """None where there is no memory for it."""
    found = None
    with suppress(torch.OutOfMemoryError):
        found = way.run(steps)
    if found is None:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def describe_machine() -> dict[str, Any]:
    """For JSON."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {**installed_versions(VERSIONED), "torch": torch.__version__},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
