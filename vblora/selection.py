"""The selection of every row as its difference from one that both sides hold.

Most rows keep their set, many keep everything. A row's members are those of the base's row that it keeps, in
their order, then its new ones by their places. Of every row is told its fate: how many of the base's places
it lacks and which member is its largest, as one number. Of rows that lack some: which, and the new ones, as
ranks among the places that the base's row does not name. Places are counted in the row's seeded order, where
the next to be chosen are nearly always the first (`vblora.candidates`). The gaps tell the rest of the order.

Gaps are values of `vblora.gaps`: of a row that stays, with the base's set and largest place, they are told as
moves from the base's gaps, of any other as they are. Where gaps are no such values, rows that differ are told
in full.

Axes: S rows, k places a row; n of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import Reader, decode_integers, encode_integers
from vblora.errors import WireError
from vblora.gaps import COARSEST, coarsest, from_moves, round_gaps, to_moves
from vblora.state import TopK
from vblora.subsets import decode_subsets, encode_subsets, steps

__all__ = ["Streams", "decode_selection", "encode_selection", "round_selection", "selection_streams"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Places = NDArray[np.int32]

IN_FULL = 255  # in place of the exponent: gaps are float32
BLOCK = 1 << 12  # rows put together at once


@dataclass(frozen=True)
class _Members:
    """Rows as differences from the rows of a base.

    Attributes:
        fates: (S,) k times how many of the base's places a row lacks, plus the member that is its largest.
        gaps: (S, k - 1) gaps of the members without the largest.
        moved: (n,) rows whose places are not the base's. Of them alone:
        lacks: (n, k) whether a place of the base's row is missing.
        order: (n, k) at which place of the row each member stands.
    """

    fates: Ints
    gaps: Floats
    moved: Ints
    lacks: Bools
    order: Ints

    @classmethod
    def of(cls, topk: TopK, base: TopK) -> _Members:
        rows, k = topk.positions.shape
        fates, gaps = np.zeros(rows, np.int64), topk.gaps
        moved = np.flatnonzero((topk.positions != base.positions).any(axis=1))
        own = topk.positions[moved]
        hits = own[:, :, None] == base.positions[moved, None, :]
        slots = np.where(hits.any(axis=2), hits.argmax(axis=2), k)  # k: a new one
        lacks, order = ~hits.any(axis=1), np.lexsort((own, slots), axis=1)
        if moved.size:
            largest = order.argmin(axis=1)
            fates[moved] = k * lacks.sum(axis=1) + largest
            later = np.take_along_axis(order, _without(largest[:, None], k), axis=1) - 1
            gaps = topk.gaps.copy()
            gaps[moved] = np.take_along_axis(topk.gaps[moved], later, axis=1)
        return cls(fates, gaps, moved, lacks, order)


@dataclass(frozen=True)
class Streams:
    """A selection taken apart into whole numbers.

    Attributes:
        how: exponent of the gaps, or `IN_FULL`.
        fates: (S,) k times how many of the base's places a row lacks, plus the member that is its largest.
        lacking: (n, t) which of the base's places are missing, rising, of rows that lack t; for each such t.
        fresh: (n, t) ranks of the new places of the same rows, rising.
        order: where gaps are in full, which rows differ, and their other members.
        gaps: moves and values.
        tail: gaps in full, instead.
    """

    how: int
    fates: Ints
    lacking: list[Ints]
    fresh: list[Ints]
    order: list[Ints]
    gaps: list[Ints]
    tail: bytes = b""

    @property
    def sets(self) -> list[Ints]:
        """Those that tell the sets and the largest members."""
        return [self.fates, *(step for part in (*self.lacking, *self.fresh) for step in steps(part))]


def encode_selection(topk: TopK, base: TopK, num_vectors: int) -> bytes:
    """Write `topk` against `base`.

    Raises:
        WireError: a row does not name k different places below h.
    """
    k, ordered = topk.positions.shape[1], np.sort(topk.positions, axis=1)
    if (ordered < 0).any() or (ordered >= num_vectors).any() or (np.diff(ordered, axis=1) == 0).any():
        raise WireError(f"selection: a row names a place twice, or one that is not 0 to {num_vectors - 1}")
    found = selection_streams(topk, base)
    parts = [bytes([found.how]), encode_integers(found.fates)]
    for lacking, fresh in zip(found.lacking, found.fresh, strict=True):
        parts += [encode_subsets(lacking, k), encode_subsets(fresh, num_vectors - k)]
    return b"".join([*parts, *map(encode_integers, (*found.order, *found.gaps)), found.tail])


def selection_streams(topk: TopK, base: TopK) -> Streams:
    """What `encode_selection` writes, stream by stream."""
    members, k = _Members.of(topk, base), topk.positions.shape[1]
    missing, lacking, fresh = members.lacks.sum(axis=1), [], []
    for count in range(1, 1 + int(missing.max(initial=0))):
        at = np.flatnonzero(missing == count)
        if at.size:
            rows, last = members.moved[at], members.order[at, k - count :]
            lacking.append(np.nonzero(members.lacks[at])[1].reshape(-1, count))
            named = np.take_along_axis(topk.positions[rows], last, axis=1)
            fresh.append(_ranks(named, base.positions[rows]))
    exponent = _exponent(topk, base, members)
    if exponent is None:
        order, tail = _in_full(topk, base, members)
        return Streams(IN_FULL, members.fates, lacking, fresh, order, [], tail)
    moves = []
    for number, rows in enumerate(_by_fate(members.fates, k)):
        gaps = members.gaps[rows]
        moves.append(to_moves(gaps, np.zeros_like(gaps) if number else base.gaps[rows], exponent))
    return Streams(exponent, members.fates, lacking, fresh, [], moves)


def decode_selection(payload: bytes | memoryview, base: TopK, num_vectors: int) -> TopK:
    """Read what `encode_selection` wrote against the same `base`.

    Raises:
        WireError: the bytes are not a selection of these rows.
    """
    data = Reader(payload)
    how = data.take(1)[0]
    members, fates = _read_sets(data, base, num_vectors)
    if how == IN_FULL:
        found = _read_in_full(data, base, members, fates)
    elif how <= COARSEST:
        found = _read_gaps(data, base, members, fates, how)
    else:
        raise WireError(f"selection: exponent {how}, expected 0 to {COARSEST}, or {IN_FULL}")
    data.finish()
    return found


def round_selection(topk: TopK, base: TopK, exponent: int, noise: np.random.Generator) -> TopK:
    """A selection whose gaps are values that a message can tell; a row like the base's keeps its bits.

    Args:
        topk: exact; where training has diverged it is given back, for the receiver to see.
        base: what it will be told against.
        exponent: gaps are every 2^exponent-th value of `vblora.gaps`.
        noise: of the roundings.
    """
    if not np.isfinite(topk.gaps).all():
        return topk
    members = _Members.of(topk, base)
    stays = (members.fates == 0)[:, None]
    start = np.where(stays, base.gaps, np.float32(0))
    turned = np.flatnonzero(members.fates[members.moved] == 0)
    rows, places = members.moved[turned], members.order[turned].argsort(axis=1)[:, 1:] - 1
    start[rows] = np.take_along_axis(base.gaps[rows], places, axis=1)  # of the same members
    gaps = round_gaps(topk.gaps, start, exponent, noise)
    kept = stays & (gaps == start).all(axis=1, keepdims=True)
    ordered = _in_order(topk.positions, gaps)
    return TopK(np.where(kept, base.positions, ordered.positions), np.where(kept, base.gaps, ordered.gaps))


def _by_fate(fates: NDArray[np.signedinteger], k: int) -> list[Ints]:
    """Rows that stay, then the others by how many of the base's places they lack, 0 to k."""
    return [np.flatnonzero(fates == 0)] + [
        np.flatnonzero((fates >= max(1, k * count)) & (fates < k * (count + 1))) for count in range(k + 1)
    ]


# --- Writing -------------------------------------------------------------------------


def _exponent(topk: TopK, base: TopK, members: _Members) -> int | None:
    """Of the coarsest values that tell all gaps; None where they do not tell a row."""
    stays = members.fates == 0
    same = (members.gaps.view(np.uint32) == base.gaps.view(np.uint32)) & stays[:, None]
    if ((members.gaps == base.gaps) & ~same & stays[:, None]).any():
        return None  # 0 and -0, which no move tells apart
    as_base = stays & same.all(axis=1)
    rest = np.flatnonzero(~as_base)
    ordered = _in_order(topk.positions[rest], topk.gaps[rest]).positions
    if as_base[members.moved].any() or not np.array_equal(ordered, topk.positions[rest]):
        return None
    return coarsest(members.gaps[~same])


def _in_full(topk: TopK, base: TopK, members: _Members) -> tuple[list[Ints], bytes]:
    """Which rows differ and their later members, and their gaps."""
    k = topk.positions.shape[1]
    differs = (topk.gaps.view(np.uint32) != base.gaps.view(np.uint32)).any(axis=1)
    differs[members.moved] = True
    order = np.tile(np.arange(k), (len(differs), 1))
    order[members.moved] = members.order.argsort(axis=1)
    gaps = np.ascontiguousarray(topk.gaps[differs], "<f4").tobytes()
    return [differs.astype(np.int64), *order[differs, 1 : k - 1].T], gaps


def _ranks(members: Places, base: Places) -> Ints:
    """(S, k) ranks of places among those that the base's row does not name; of such places only."""
    return np.asarray(members - (base[:, None, :] < members[:, :, None]).sum(axis=2))


# --- Reading -------------------------------------------------------------------------


def _read_sets(data: Reader, base: TopK, num_vectors: int) -> tuple[Places, NDArray[np.int32]]:
    """(S, k) places of the members, and (S,) fates."""
    rows, k = base.positions.shape
    fates = _bounded("a row's fate", decode_integers(data, rows), k * (k + 1) - 1)
    members, missing = base.positions.copy(), fates // k
    for count in range(1, 1 + int(missing.max(initial=0))):
        inside = np.flatnonzero(missing == count)
        if inside.size:
            lacking = decode_subsets(data, inside.size, count, k)
            fresh = decode_subsets(data, inside.size, count, num_vectors - k)
            for run in _runs(inside.size):
                rows = inside[run]
                members[rows] = _replaced(base.positions[rows], lacking[run], fresh[run])
    return members, fates


def _replaced(old: Places, lacking: Places, fresh: Places) -> Places:
    """(n, k) the places of `old` but those at `lacking`, (n, t), then the new ones by their ranks, (n, t)."""
    lacks = np.zeros(old.shape, np.bool_)
    np.put_along_axis(lacks, lacking, True, axis=1)
    members = np.take_along_axis(old, lacks.argsort(axis=1, kind="stable"), axis=1)
    for named in np.sort(old, axis=1).T:
        fresh = fresh + (fresh >= named[:, None])  # at or above the j-th named place it is one further
    members[:, old.shape[1] - fresh.shape[1] :] = fresh
    return members


def _read_gaps(data: Reader, base: TopK, members: Places, fates: NDArray[np.int32], exponent: int) -> TopK:
    """Gaps as moves and values; they give the order of the members, which are overwritten with it."""
    count, k = members.shape
    gaps = np.zeros((count, k - 1), np.float32)
    for number, inside in enumerate(_by_fate(fates, k)):
        start = np.zeros((inside.size, k - 1), np.float32) if number else base.gaps[inside]
        moves = decode_integers(data, start.size).reshape(start.shape)
        values = from_moves(moves, start, exponent)
        if values is None:
            raise WireError(f"selection: a gap of {moves.min()} to {moves.max()} values is beyond the last")
        gaps[inside] = values
    for rows in _runs(count):
        largest = fates[rows, None] % k
        first = np.take_along_axis(members[rows], largest, axis=1)
        later = np.take_along_axis(members[rows], _without(largest, k), axis=1)
        found = _in_order(np.concatenate([first, later], axis=1), gaps[rows])
        kept = (fates[rows] == 0) & (gaps[rows].view(np.uint32) == base.gaps[rows].view(np.uint32)).all(
            axis=1
        )
        members[rows] = np.where(kept[:, None], base.positions[rows], found.positions)
        gaps[rows] = np.where(kept[:, None], base.gaps[rows], found.gaps)
    return TopK(members, gaps)


def _read_in_full(data: Reader, base: TopK, members: Places, fates: NDArray[np.int32]) -> TopK:
    """Order and gaps of the rows that differ from the base's."""
    rows, k = members.shape
    differs = np.flatnonzero(_bounded("a row that differs or not", decode_integers(data, rows), 1))
    at = np.zeros((differs.size, k), np.int16)
    at[:, 0] = fates[differs] % k
    for place in range(1, k - 1):
        at[:, place] = _bounded("a member", decode_integers(data, differs.size), k - 1)
    at[:, k - 1] = k * (k - 1) // 2 - at[:, : k - 1].sum(axis=1, dtype=np.int16)  # the one that is left
    if not np.array_equal(np.sort(at, axis=1), np.broadcast_to(np.arange(k), at.shape)):
        raise WireError("selection: a row names a member twice")
    positions, gaps = base.positions.copy(), base.gaps.copy()
    positions[differs] = np.take_along_axis(members[differs], at, axis=1)
    floats = np.frombuffer(data.take(4 * differs.size * (k - 1)), "<f4")
    gaps[differs] = floats.reshape(differs.size, k - 1)
    return TopK(positions, gaps)


def _bounded(what: str, numbers: NDArray[Any], most: int) -> NDArray[Any]:
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= most:
        raise WireError(f"selection: {what} is {numbers.min()} to {numbers.max()}, expected 0 to {most}")
    return numbers


def _in_order(positions: Places, gaps: Floats) -> TopK:
    """The later places of each row by their gaps, equal ones by their places: the order that gaps tell."""
    if gaps.shape[1] < 2:
        return TopK(positions, gaps)
    order = np.lexsort((positions[:, 1:], gaps), axis=1)
    later = np.take_along_axis(positions[:, 1:], order, axis=1)
    return TopK(np.concatenate([positions[:, :1], later], axis=1), np.take_along_axis(gaps, order, axis=1))


def _runs(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def _without(largest: NDArray[np.signedinteger], k: int) -> Ints:
    """(n, k - 1) the members but one, (n, 1)."""
    members = np.arange(k - 1)
    return np.asarray(members + (members >= largest))
