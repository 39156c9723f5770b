"""The selection of every row as its difference from one that both sides hold.

Most rows keep their set, many keep everything. Of a row that changed, each place is told as one of the
reference's places or as a new one, and a new one by its rank among the places that the reference does not
name: places are counted in the row's seeded order, where the next to be chosen are nearly always the first
(`vblora.candidates`). Gaps lie on a grid of `GAP_STEP`; a gap of a set that stayed is told by its change.

Axes: S rows, k places a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import Reader, decode_integers, encode_integers
from vblora.errors import WireError
from vblora.state import TopK

__all__ = ["GAP_STEP", "LARGEST_GAP", "decode_selection", "encode_selection", "gap_codes", "on_gap_grid"]

GAP_STEP = 2.0**-6  # of a gap in logits: a weight moves by 0.4% at most
LARGEST_GAP = 1024  # steps: a weight of e^-16

SAME, REWEIGHTED, CHOSEN_ANEW = 0, 1, 2  # what became of a row

Ints = NDArray[np.int64]


def gap_codes(gaps: NDArray[np.float32]) -> Ints:
    """The nearest steps of the grid, shape as `gaps`."""
    codes: Ints = np.rint(np.clip(gaps / np.float32(GAP_STEP), 0, LARGEST_GAP)).astype(np.int64)
    return codes


def on_gap_grid(topk: TopK, base: TopK) -> bool:
    """Whether `encode_selection` can tell `topk`: every row is that of `base` or has its gaps on the grid."""
    moved = topk.gaps[~topk.same_rows(base)]
    return np.array_equal(_gaps(gap_codes(moved)), moved)


def encode_selection(topk: TopK, base: TopK) -> bytes:
    """Write `topk`, for which `on_gap_grid` holds."""
    same = topk.same_rows(base)
    stayed = (topk.positions == base.positions).all(axis=1)
    fates = np.where(same, SAME, np.where(stayed, REWEIGHTED, CHOSEN_ANEW))
    anew = np.flatnonzero(fates == CHOSEN_ANEW)
    out = [encode_integers(fates)]
    slots, ranks = _slots(topk.positions[anew].astype(np.int64), base.positions[anew].astype(np.int64))
    for _, stream in _by_context(slots):
        out.append(encode_integers(stream))
    out.append(encode_integers(ranks))
    codes = gap_codes(topk.gaps)
    steps = np.diff(codes[anew], prepend=0, axis=1)
    reweighted = fates == REWEIGHTED
    out.append(encode_integers(codes[reweighted] - gap_codes(base.gaps[reweighted])))
    out.append(encode_integers(steps))
    return b"".join(out)


def decode_selection(payload: bytes | memoryview, base: TopK, num_vectors: int) -> TopK:
    """Read what `encode_selection` wrote against the same `base`.

    Raises:
        WireError: the bytes are not a selection of these rows.
    """
    data, (rows, k) = Reader(payload), base.positions.shape
    fates = decode_integers(data, rows)
    if not ((fates >= SAME) & (fates <= CHOSEN_ANEW)).all():
        raise WireError("selection: a row is neither kept, nor weighed, nor chosen anew")
    anew, reweighted = np.flatnonzero(fates == CHOSEN_ANEW), np.flatnonzero(fates == REWEIGHTED)
    positions, gaps = base.positions.copy(), base.gaps.copy()
    positions[anew] = _read_positions(data, base.positions[anew].astype(np.int64), num_vectors)
    moves = decode_integers(data, reweighted.size * (k - 1)).reshape(reweighted.size, k - 1)
    steps = decode_integers(data, anew.size * (k - 1)).reshape(anew.size, k - 1)
    data.finish()
    gaps[reweighted] = _gaps(gap_codes(base.gaps[reweighted]) + moves)
    gaps[anew] = _gaps(np.cumsum(steps, axis=1))
    return TopK(positions, gaps)


def _gaps(codes: Ints) -> NDArray[np.float32]:
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) <= LARGEST_GAP:
        raise WireError(
            f"selection: gaps run from {codes.min()} to {codes.max()} steps, expected 0 to {LARGEST_GAP}"
        )
    return codes.astype(np.float32) * np.float32(GAP_STEP)


def _slots(positions: Ints, base: Ints) -> tuple[Ints, Ints]:
    """(n, k) which of the base's places each is, k for a new one; (m,) ranks of the new ones, in order."""
    k = base.shape[1]
    hits = positions[:, :, None] == base[:, None, :]
    slots = np.where(hits.any(axis=2), hits.argmax(axis=2), k)
    below = (base[:, None, :] < positions[:, :, None]).sum(axis=2)
    return slots, (positions - below)[slots == k]


def _by_context(slots: Ints) -> list[tuple[NDArray[np.bool_], Ints]]:
    """Streams of slots: the first of all rows, then each later one by what stands before it.

    Gives (rows of the stream, its symbols).
    """
    rows, k = slots.shape
    streams = [(np.ones(rows, np.bool_), slots[:, 0])]
    for turn in range(1, k):
        for before in range(k + 1):
            inside = slots[:, turn - 1] == before
            streams.append((inside, slots[inside, turn]))
    return streams


def _read_positions(data: Reader, base: Ints, num_vectors: int) -> NDArray[np.int32]:
    rows, k = base.shape
    slots = np.zeros((rows, k), np.int64)
    slots[:, 0] = decode_integers(data, rows)
    for turn in range(1, k):
        for before in range(k + 1):
            inside = slots[:, turn - 1] == before
            slots[inside, turn] = decode_integers(data, int(inside.sum()))
    if slots.size and not 0 <= int(slots.min()) <= int(slots.max()) <= k:
        raise WireError(f"selection: a place refers to {int(slots.max())}, expected 0 to {k}")
    fresh = slots == k
    ranks = decode_integers(data, int(fresh.sum())).astype(np.int64)
    if ranks.size and not 0 <= int(ranks.min()) <= int(ranks.max()) < num_vectors - k:
        raise WireError(
            f"selection: new places rank {ranks.min()} to {ranks.max()}, expected 0 to {num_vectors - k - 1}"
        )
    positions = np.take_along_axis(base, np.minimum(slots, k - 1), axis=1)
    named = np.sort(base, axis=1)[np.nonzero(fresh)[0]]
    for place in range(k):  # a place at or above the j-th named one is one further than its rank
        ranks = ranks + (ranks >= named[:, place])
    positions[fresh] = ranks
    return positions.astype(np.int32)
