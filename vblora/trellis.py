"""Rounding along a trellis: which multiples of a step a number may take depends on the numbers before it.

Numbers are rounded in lanes. A lane walks through eight states; in an even state a number may become an even
multiple of the step, in an odd one an odd multiple or 0, and the multiple decides the next state. So each
number has few multiples to choose from, as few as with twice the step, but the best walk (Viterbi's) comes
nearer to all of them together: as much error as plain steps 1.12 times as fine, at the cost of steps twice as
coarse. Known as trellis-coded or dependent quantisation (Marcellin and Fischer 1990; Schwarz et al., "Hybrid
video coding with trellis-coded quantization", DCC 2019, whose states these are).

Axes: n lanes, L numbers of a lane.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import LARGEST

__all__ = ["NEXT", "lane_length", "round_lanes", "walk"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# The next state, by state and whether the number of the multiple is odd. Odd states take odd multiples.
NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]], np.int8)
STATES = len(NEXT)
# The two ways into a state: from which state, and by which of the four kinds of multiples.
_WAYS = [[(s, odd) for s in range(STATES) for odd in (0, 1) if NEXT[s, odd] == t] for t in range(STATES)]
_FROM = np.array([[state for state, _ in ways] for ways in _WAYS])
_KIND = np.array([[2 * (state & 1) + odd for state, odd in ways] for ways in _WAYS])

LONGEST_LANE, SHORTEST_LANE = 128, 8
BLOCK_LANES = 512  # lanes rounded at once


def lane_length(count: int) -> int:
    """How many numbers a lane of a section of `count` has: a power of two near the root, 8 to 128."""
    root = 1 << max(0, (count.bit_length() - 1) // 2)
    return min(LONGEST_LANE, max(SHORTEST_LANE, root))


def round_lanes(values: Floats, step: float) -> Ints:
    """The multiples of `step` that come nearest to `values` along the trellis.

    Args:
        values: of any shape, finite; in C order they are cut into lanes.
        step: above 0.

    Returns:
        As int64, shape as `values`. Halves of a step apart where plain rounding would put a whole one.
    """
    flat = values.reshape(-1)
    length = lane_length(flat.size)
    lanes = np.zeros((-(-flat.size // length), length), np.float32)
    lanes.reshape(-1)[: flat.size] = flat / np.float32(step)
    out = np.zeros(lanes.shape, np.int64)
    for start in range(0, len(lanes), BLOCK_LANES):
        out[start : start + BLOCK_LANES] = _best_walk(lanes[start : start + BLOCK_LANES])
    return out.reshape(-1)[: flat.size].reshape(values.shape)


def walk(multiples: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int8]] | None:
    """Lanes of multiples as the trellis counts them, or None where they do not follow it.

    Args:
        multiples: (n, L), of size `LARGEST` at most; those of that size follow none.

    Returns:
        (n, L) the number of each multiple among those that its state allows (k stands for 2k in an even
        state, for 2k - sign(k) in an odd one), and (n, L) 1 where the state is odd.
    """
    numbers = np.zeros_like(multiples)
    odd = np.zeros(multiples.shape, np.int8)
    state = np.zeros(len(multiples), np.int8)
    for at in range(multiples.shape[1]):
        here = multiples[:, at].astype(np.int64)
        odd[:, at] = state & 1
        inside = np.where(odd[:, at] == here & 1, np.abs(here) < LARGEST, here == 0)
        if not inside.all():
            return None
        numbers[:, at] = (here + np.sign(here) * odd[:, at]) // 2
        state = NEXT[state, numbers[:, at] & 1]
    return numbers, odd


def _best_walk(lanes: Floats) -> Ints:
    """(n, L) multiples for (n, L) numbers in units of the step."""
    count, length = lanes.shape
    size = np.ascontiguousarray(np.abs(lanes.T))
    nearest = np.stack(  # (L, kind, n): of an even state an even number's and an odd one's; of an odd state
        [
            4 * np.rint(size / 4),
            np.maximum(2, 4 * np.rint((size - 2) / 4) + 2),
            np.where(size < 1.5, 0, np.maximum(3, 4 * np.rint((size - 3) / 4) + 3)),
            np.maximum(1, 4 * np.rint((size - 1) / 4) + 1),
        ],
        axis=1,
    )
    error = np.square(size[:, None] - nearest)
    cost = np.full((STATES, count), np.inf, np.float32)
    cost[0] = 0
    second = np.zeros((length, STATES, count), np.bool_)  # which of the two ways was better
    for at in range(length):
        one = cost[_FROM[:, 0]] + error[at][_KIND[:, 0]]
        other = cost[_FROM[:, 1]] + error[at][_KIND[:, 1]]
        second[at] = other < one
        cost = np.minimum(one, other)
    state, every = cost.argmin(axis=0), np.arange(count)
    out = np.zeros((length, count), np.int64)
    for at in reversed(range(length)):
        way = second[at, state, every].astype(np.int8)
        out[at] = nearest[at, _KIND[state, way], every]
        state = _FROM[state, way]
    return np.asarray(out.T * np.where(lanes < 0, -1, 1))
