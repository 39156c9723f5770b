"""The logits that a selection stands for, above the seeds that everyone draws. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vblora.spec import VBLoRASpec
from vblora.state import TopK

__all__ = ["anchored"]

Floats = NDArray[np.float32]


def anchored(spec: VBLoRASpec, seeds: Floats, topk: TopK, *, keep: bool = False) -> Floats:
    """(S, k) logits of the chosen, from additions and maxima alone: the same bits everywhere.

    Args:
        spec: gives k, h and the margin.
        seeds: (S, W) seeded logits of the first W >= k + 1 places of each row (W = h where h is less).
        topk: the selection.
        keep: a row that chooses as its seeds do keeps them, whatever the margin (`vblora.start`).
    """
    last = topk.positions[:, -1:]
    lowest = np.take_along_axis(seeds, np.minimum(last, seeds.shape[1] - 1), axis=1)
    if spec.topk < spec.num_vectors:
        missing = _first_missing(topk.positions)[:, None]
        # A place beyond the first missing one has a lower seed: its own never decides, nor one cut to W - 1.
        lowest = np.maximum(lowest, np.take_along_axis(seeds, missing, axis=1) + np.float32(spec.margin))
    spans = np.concatenate([np.zeros((len(topk.gaps), 1), np.float32), topk.gaps], axis=1)
    logits = _untied(lowest + (spans[:, -1:] - spans), topk.positions)
    if keep:
        first = seeds[:, : spec.topk]
        as_seeded = (topk.positions == np.arange(spec.topk)).all(axis=1)
        as_seeded &= (topk.gaps == first[:, :1] - first[:, 1:]).all(axis=1)
        logits[as_seeded] = first[as_seeded]
    return logits


def _first_missing(positions: NDArray[np.int32]) -> NDArray[np.int64]:
    """(S,) the smallest place that is not in a row's set."""
    ranked = np.sort(positions, axis=1)
    unbroken = (ranked == np.arange(positions.shape[1])).cumprod(axis=1)
    return np.asarray(unbroken.sum(axis=1), np.int64)


def _untied(logits: Floats, positions: NDArray[np.int32]) -> Floats:
    """`logits` (S, k), first the largest, moved apart by one step of float32 where a tie would change that.

    Rounding ties logits whose gap is small against their level, and of a tie the lower place comes first.
    """
    for turn in range(logits.shape[1] - 2, -1, -1):
        later = logits[:, turn + 1]
        above = np.nextafter(later, np.float32(np.inf))
        least = np.where(positions[:, turn] > positions[:, turn + 1], above, later)
        logits[:, turn] = np.maximum(logits[:, turn], least)
    return logits
