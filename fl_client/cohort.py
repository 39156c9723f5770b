"""How many clients share one forward: as many as memory holds, found out by trying."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

__all__ = ["ON_CPU", "CohortSizer", "out_of_memory"]

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

SHARE = 0.8  # of the free memory; the rest is for longer texts and fragmentation
LARGEST = 256

# On a CPU, where one client keeps the cores busy, four together save 6% of a step of 8 texts of 32 tokens
# (MiniLM, one core; eight save no more). Padding them to one length costs more than that as soon as their
# texts differ.
ON_CPU = 4
MOST_PADDING = 1.03  # tokens computed over tokens that are there


class CohortSizer:
    """Splits clients into cohorts and remembers which size fits.

    On a GPU the first client trains alone, and what it took tells how many fit. A cohort that runs out of
    memory is trained again in halves; the smaller size is kept. Elsewhere only clients whose texts are about
    as long train together.
    """

    def __init__(self, device: torch.device, size: int = 0) -> None:
        """`size` fixes the number of clients; 0 chooses, on a GPU by what is free at the time, so another
        process may choose otherwise. Out of memory, it is halved all the same."""
        self._device = device
        measured = device.type == "cuda"  # others do not tell what is free
        self._size = size or (0 if measured else ON_CPU)
        self._most_padding = math.inf if measured or size else MOST_PADDING

    def run(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], list[Result]],
        padding: Callable[[Sequence[Item]], float] = lambda group: 1.0,
    ) -> Iterator[Result]:
        """Yield `work` of all items, in their order; the largest should come first.

        Args:
            items: what is to be done.
            work: of some items together. It must not leave anything behind when it fails.
            padding: tokens that some items together compute, over the tokens that they have.
        """
        start = 0
        while start < len(items):
            group = items[start : start + (self._size or 1)]
            while len(group) > 1 and padding(group) > self._most_padding:
                group = group[:-1]
            results = self._tried(group, work)
            if results is None:  # here, not in the handler: an error holds on to the tensors of its frames
                self._size = len(group) // 2
                log.warning(
                    "out of memory with %d clients in one forward; going on with %d", len(group), self._size
                )
                _free(self._device)
                continue
            yield from results
            start += len(group)

    def _tried(
        self, group: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result] | None:
        """`work` of a group; None where there was no memory for so many."""
        try:
            return work(group) if self._size else self._measured(group, work)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if len(group) == 1 or not out_of_memory(error):
                raise
            return None

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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says so: of the device's allocator, the CPU's, or a library's."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
