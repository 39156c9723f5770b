"""How many clients share one forward: as many as memory holds, found out by trying."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

__all__ = ["CohortSizer"]

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

SHARE = 0.8  # of the free memory; the rest is for longer texts and fragmentation
LARGEST = 256


class CohortSizer:
    """Splits clients into cohorts and remembers which size fits.

    On a GPU the first client trains alone, and what it took tells how many fit. A cohort that runs out of
    memory is trained again in halves; the smaller size is kept. On a CPU, where one client fills the cores,
    the size is 1.
    """

    def __init__(self, device: torch.device, size: int = 0) -> None:
        """`size` fixes the number of clients; 0 chooses. Out of memory, it is halved all the same."""
        self._device = device
        self._size = size or (1 if device.type == "cpu" else 0)

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]) -> Iterator[Result]:
        """Yield `work` of all items, in their order. `work` must not leave anything behind when it fails."""
        start = 0
        while start < len(items):
            group = items[start : start + (self._size or 1)]
            try:
                results = work(group) if self._size else self._measured(group, work)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if len(group) == 1 or not _out_of_memory(error):
                    raise
                self._size = len(group) // 2
                log.warning(
                    "out of memory with %d clients in one forward; going on with %d", len(group), self._size
                )
                _free(self._device)
                continue
            yield from results
            start += len(group)

    def _measured(
        self, group: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        results = work(group)
        taken = max(1, torch.cuda.max_memory_allocated(self._device) - before)
        _free(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        self._size = int(min(LARGEST, max(1, SHARE * free // taken)))
        return results


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
