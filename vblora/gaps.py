"""The values that a gap between two logits takes on the wire, and rounding to them.

A mixture feels a gap through its weight, 1 / (1 + e^gap), and weights are what a server averages. So the
values lie dense where gaps are small and sparse where they are large: much the same step of a weight
everywhere. A message uses all of them, or every second, every fourth, ..., and the value that the base has.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["COARSEST", "GAPS", "coarsest", "from_moves", "nearest_gaps", "round_gaps", "to_moves"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def _values() -> Iterator[float]:
    """0, 1/64, ... 1, 1 + 1/32, ... 2, 2 + 1/16, ... 7, 9, 13, 21: steps double every 1, then every time."""
    value, step = 0.0, 1 / 64
    while value <= 21:
        for _ in range(max(1, int(1 / step))):
            yield value
            value += step
        step *= 2


GAPS: Floats = np.array(list(_values()), np.float32)
GAPS.flags.writeable = False
COARSEST = 6  # a message may use every 2^6-th value
BLOCK = 1 << 14  # gaps computed at once


def coarsest(gaps: Floats) -> int | None:
    """The largest exponent e for which all of `gaps` are 2^e-th values; None where one is no value."""
    codes = np.minimum(np.searchsorted(GAPS, gaps), len(GAPS) - 1)
    if not np.array_equal(GAPS[codes].view(np.uint32), gaps.view(np.uint32)):
        return None
    bits = int(np.bitwise_or.reduce(codes.reshape(-1), initial=1 << COARSEST))
    return (bits & -bits).bit_length() - 1


def to_moves(gaps: Floats, base: Floats, exponent: int) -> Ints:
    """How many of the values that a message uses a gap lies above its base, or below; 0 where they are equal.

    Args:
        gaps: among these values, or equal to `base`.
        base: any, shape as `gaps`.
        exponent: the message uses every 2^exponent-th value.
    """
    values = _used(exponent)
    at, (below, above) = np.searchsorted(values, gaps), _around(values, base)
    return np.where(gaps == base, 0, at - np.where(gaps > base, below, above))


def from_moves(moves: NDArray[np.signedinteger], base: Floats, exponent: int) -> Floats | None:
    """The gaps that `to_moves` told, or None where a move leads beyond the values."""
    values, found = _used(exponent), np.empty(base.size, np.float32)
    told, start = moves.reshape(-1), base.reshape(-1)
    for at in range(0, base.size, BLOCK):
        move, own = told[at : at + BLOCK].astype(np.int64), start[at : at + BLOCK]
        below, above = _around(values, own)
        place = move + np.where(move > 0, below, above)
        if not ((move == 0) | ((place >= 0) & (place < len(values)))).all():
            return None
        found[at : at + BLOCK] = np.where(move == 0, own, values[np.clip(place, 0, len(values) - 1)])
    return found.reshape(base.shape)


def round_gaps(gaps: Floats, base: Floats, exponent: int, noise: np.random.Generator) -> Floats:
    """Gaps on the values of a message or on their base, up or down by chance: weights are right in the mean.

    Args:
        gaps: finite.
        base, exponent: as in `to_moves`.
        noise: of the draw.
    """
    values = _used(exponent)
    wanted = np.clip(gaps, values[0], values[-1])
    at = np.minimum(np.searchsorted(values, wanted, "right") - 1, len(values) - 2)
    low, high = values[at], values[at + 1]
    low = np.where((low < base) & (base <= wanted), base, low)
    high = np.where((wanted <= base) & (base < high), base, high)
    weight, lowest, highest = (_weight(item) for item in (wanted, low, high))
    share = (lowest - weight) / np.where(low == high, 1, lowest - highest)
    drawn = np.where(noise.random(gaps.shape) < share, high, low)
    return np.where(gaps == base, base, drawn).astype(np.float32)


def nearest_gaps(gaps: Floats) -> Floats:
    """The nearest values."""
    middles = (GAPS[1:] + GAPS[:-1]) / 2
    return GAPS[np.searchsorted(middles, gaps)]


def _around(values: Floats, gaps: Floats) -> tuple[Ints, Ints]:
    """Numbers of the last of the values that is at most each gap, and of the first that is at least that."""
    above = np.searchsorted(values, gaps)
    return above - (values[np.minimum(above, len(values) - 1)] != gaps), above


def _used(exponent: int) -> Floats:
    return GAPS[:: 1 << exponent]


def _weight(gaps: Floats) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(gaps.astype(np.float64))))
