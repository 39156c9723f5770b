"""The step at which the rounded numbers of a section take as many bits as they may."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import plain_width, to_tokens
from vblora.lanes import MOST_CLASS, lane_classes
from vblora.trellis import lane_length

__all__ = ["Rounding", "find_step"]

SAMPLE = 1 << 13  # numbers that a step is found by
SEARCH = 16  # steps that are tried, at most
REACH = 4.0  # octaves from one to the next, at most
CLOSE = 0.03  # bits from what was asked for, before the last move
FINEST = 20  # octaves below the largest number, at most: few numbers that are not 0 cost little however fine
SMALLEST = -126.0  # octave of the smallest step, a normal float32
NORMAL = 2.05  # bits of a normal number at a step of its standard deviation
GOLDEN = 0.618  # multiples of it lie evenly between 0 and 1

Lanes = NDArray[np.floating]
Rounding = Literal["nearest", "chance", "trellis"]


def find_step(change: NDArray[np.floating], bits: float, rounding: Rounding = "nearest") -> float:
    """The step whose multiples, coded as `vblora.lanes` does, take about `bits` bits a number.

    Found on a sample: the cost falls as the step grows. 1 where nothing changes.

    Args:
        change: finite.
        bits: above 0.
        rounding: how numbers become multiples: the nearest, the next up or down, or along the trellis.
    """
    flat = change.reshape(-1)
    length = min(flat.size, lane_length(flat.size))
    lanes = flat[: flat.size // length * length].reshape(-1, length)
    moved = lanes[lanes.any(axis=1)]
    if not moved.size:
        return float(np.abs(flat).max(initial=0.0)) or 1.0
    sample = moved[:: max(1, moved.size // SAMPLE)]
    spare = bits * len(lanes) / len(moved)  # bits of a number of the lanes that move
    spread = np.log2(np.square(sample, dtype=np.float64).mean(axis=1)) / 2
    finest = max(float(np.log2(np.abs(flat).max())) - FINEST, SMALLEST)
    octave = max(finest, float(spread.mean()) + NORMAL - (rounding == "trellis") - spare)
    for _ in range(SEARCH):  # a step twice as large costs one bit less, or under one where most are zeros
        miss = _cost(sample, 2.0**octave, rounding) - spare
        octave = max(finest, octave + float(np.clip(miss, -REACH, REACH)))
        if abs(miss) < CLOSE or octave == finest:
            break
    return float(2.0**octave)


def _cost(lanes: Lanes, step: float, rounding: Rounding) -> float:
    """Bits a number, with frequencies as they are in each context."""
    whole = lanes / step
    odd = np.zeros(lanes.shape[1], np.int64)
    if rounding == "chance":
        whole += np.arange(lanes.size).reshape(lanes.shape) * GOLDEN % 1 - 0.5
    elif rounding == "trellis":  # every second number stands in for those of odd states
        odd[::2] = 1
        size = np.abs(whole)
        whole = np.where(odd, np.sign(whole) * np.where(size < 0.5, 0, (size + 1) / 2), whole / 2)
    numbers = np.rint(whole).astype(np.int32)
    tokens = to_tokens(numbers.reshape(-1))
    alphabet = int(tokens.max()) + 1
    contexts = (2 * lane_classes(numbers)[:, None] + odd).reshape(-1)
    counts = np.bincount(contexts * alphabet + tokens, minlength=2 * (MOST_CLASS + 1) * alphabet)
    table = counts.reshape(-1, alphabet)
    coded = _sum_of_logs(table.sum(axis=1)) - _sum_of_logs(counts)
    return (coded + float(table.sum(axis=0) @ plain_width(np.arange(alphabet)))) / tokens.size


def _sum_of_logs(counts: NDArray[np.int64]) -> float:
    counts = counts[counts > 0]
    return float((counts * np.log2(counts)).sum())
