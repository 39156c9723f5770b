"""The selection of every row as its difference from one that both sides hold.

Most rows keep their set, many keep everything. A set is told by the places of the base's row that it lacks
and by the new ones, as ranks among the places that the base's row does not name: places are counted in the
row's seeded order, where the next to be chosen are nearly always the first (`vblora.candidates`); where they
are not, as when sets are drawn evenly, packing all ranks of a row as one is shorter. Of the order only the
largest place is told; the gaps give the others. The members of a row are counted thus: those of the base's
row in its order, then the new ones by their places.

Gaps are values of `vblora.gaps`: of a row that stays, with the base's set and largest place, they are told as
moves from the base's gaps, of any other as they are. Where gaps are no such values, rows that differ are told
in full.

Axes: S rows, k places a row; n of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
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

IN_FULL = 255  # in place of the exponent: gaps are float32


@dataclass(frozen=True)
class _Members:
    """Rows as differences from the rows of a base.

    Attributes:
        lacks: (S, k) whether a place of the base's row is missing.
        order: (S, k) at which place of the row each member stands.
        missing: (S,) how many of the base's places are.
        largest: (S,) the member that stands first.
    """

    lacks: Bools
    order: Ints
    missing: Ints
    largest: Ints

    @classmethod
    def of(cls, topk: TopK, base: TopK) -> _Members:
        k = topk.positions.shape[1]
        hits = topk.positions[:, :, None] == base.positions[:, None, :]
        slots = np.where(hits.any(axis=2), hits.argmax(axis=2), k)  # k: a new one
        lacks, order = ~hits.any(axis=1), np.lexsort((topk.positions, slots), axis=1)
        return cls(lacks, order, lacks.sum(axis=1), order.argmin(axis=1))

    @property
    def stays(self) -> Bools:
        """(S,) whether a row has the base's set and largest place."""
        return np.asarray((self.missing == 0) & (self.largest == 0))

    def later_gaps(self, topk: TopK) -> Floats:
        """(S, k - 1) gaps of the members without the largest."""
        gaps = np.concatenate([np.zeros((len(topk.gaps), 1), np.float32), topk.gaps], axis=1)
        later = _without(self.largest, self.order.shape[1])
        return np.take_along_axis(np.take_along_axis(gaps, self.order, axis=1), later, axis=1)


@dataclass(frozen=True)
class Streams:
    """A selection taken apart into whole numbers.

    Attributes:
        how: exponent of the gaps, or `IN_FULL`.
        lacks: which of the base's places are missing.
        fresh: (n, t) ranks of the new places of rows with t of them, rising, for t of 1 to k.
        order: which member is the largest; where gaps are in full also the others.
        gaps: moves and values.
        tail: gaps in full, instead.
    """

    how: int
    lacks: list[Ints]
    fresh: list[Ints]
    order: list[Ints]
    gaps: list[Ints]
    tail: bytes = b""

    @property
    def all(self) -> list[Ints]:
        """All of whole numbers."""
        fresh = [step for ranks in self.fresh for step in steps(ranks)]
        return [*self.lacks, *fresh, *self.order, *self.gaps]


def encode_selection(topk: TopK, base: TopK, num_vectors: int) -> bytes:
    """Write `topk` against `base`.

    Raises:
        WireError: a row does not name k different places below h.
    """
    ordered = np.sort(topk.positions, axis=1)
    if (ordered < 0).any() or (ordered >= num_vectors).any() or (np.diff(ordered, axis=1) == 0).any():
        raise WireError(f"selection: a row names a place twice, or one that is not 0 to {num_vectors - 1}")
    found = selection_streams(topk, base)
    free = num_vectors - topk.positions.shape[1]
    parts = [bytes([found.how]), *map(encode_integers, found.lacks)]
    parts += [encode_subsets(ranks, free) for ranks in found.fresh if len(ranks)]
    parts += map(encode_integers, (*found.order, *found.gaps))
    return b"".join([*parts, found.tail])


def selection_streams(topk: TopK, base: TopK) -> Streams:
    """What `encode_selection` writes, stream by stream."""
    members, k = _Members.of(topk, base), topk.positions.shape[1]
    lacks = [members.lacks[rows, place].astype(np.int64) for rows, place in _lack_streams(members.lacks)]
    ranks = _ranks(np.take_along_axis(topk.positions, members.order, axis=1), base.positions)
    by_missing = _by_missing(members.missing, k)
    fresh = [ranks[rows, k - count :] for count, rows in enumerate(by_missing) if count]
    order = [members.largest[rows] for rows in by_missing]
    exponent = _exponent(topk, base, members)
    if exponent is None:
        differs = ~_same(topk, base)
        later = members.order.argsort(axis=1)[differs, 1 : k - 1]
        in_full = np.ascontiguousarray(topk.gaps[differs], "<f4").tobytes()
        return Streams(IN_FULL, lacks, fresh, [*order, differs.astype(np.int64), *later.T], [], in_full)
    gaps, stays = members.later_gaps(topk), members.stays
    moves = [to_moves(gaps[stays], base.gaps[stays], exponent)]
    for rows in _by_missing(np.where(stays, -1, members.missing), k):
        moves.append(to_moves(gaps[rows], np.zeros_like(gaps[rows]), exponent))
    return Streams(exponent, lacks, fresh, order, moves)


def decode_selection(payload: bytes | memoryview, base: TopK, num_vectors: int) -> TopK:
    """Read what `encode_selection` wrote against the same `base`.

    Raises:
        WireError: the bytes are not a selection of these rows.
    """
    data = Reader(payload)
    how = data.take(1)[0]
    positions, missing = _read_sets(data, base, num_vectors)
    largest = _read_largest(data, missing, positions.shape[1])
    if how == IN_FULL:
        found = _read_in_full(data, base, positions, largest)
    elif how <= COARSEST:
        found = _read_gaps(data, base, positions, missing, largest, how)
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
    stays = members.stays[:, None]
    places = members.order.argsort(axis=1)[:, 1:] - 1  # of a row that stays, members as the base has them
    start = np.where(stays, np.take_along_axis(base.gaps, np.maximum(places, 0), axis=1), np.float32(0))
    gaps = round_gaps(topk.gaps, start, exponent, noise)
    kept = stays & (gaps == start).all(axis=1, keepdims=True)
    ordered = _in_order(topk.positions, gaps)
    return TopK(np.where(kept, base.positions, ordered.positions), np.where(kept, base.gaps, ordered.gaps))


# --- Streams: which rows, which column; the same for who writes and who reads --------


def _lack_streams(lacks: Bools) -> Iterator[tuple[Ints, int]]:
    """Place by place of the base's rows, by how many before are missing."""
    before = np.zeros(len(lacks), np.int8)
    for place in range(lacks.shape[1]):
        for count in range(place + 1):
            yield np.flatnonzero(before == count), place
        before = before + lacks[:, place]


def _by_missing(missing: NDArray[np.signedinteger], k: int) -> list[Ints]:
    """Rows by how many of the base's places they lack, 0 to k."""
    return [np.flatnonzero(missing == count) for count in range(k + 1)]


# --- Writing -------------------------------------------------------------------------


def _exponent(topk: TopK, base: TopK, members: _Members) -> int | None:
    """Of the coarsest values that tell all gaps; None where gaps do not tell a row."""
    same, stays, gaps = _same(topk, base), members.stays, members.later_gaps(topk)
    as_base = stays[:, None] & (gaps.view(np.uint32) == base.gaps.view(np.uint32))
    if (stays & as_base.all(axis=1) & ~same).any():
        return None
    positions = _in_order(topk.positions[~same], topk.gaps[~same]).positions
    return coarsest(gaps[~as_base]) if np.array_equal(positions, topk.positions[~same]) else None


def _ranks(members: NDArray[np.int32], base: NDArray[np.int32]) -> Ints:
    """(S, k) ranks of places among those that the base's row does not name; of such places only."""
    return np.asarray(members - (base[:, None, :] < members[:, :, None]).sum(axis=2))


def _same(topk: TopK, base: TopK) -> Bools:
    """(S,) rows that are the base's to the bit."""
    bits = topk.gaps.view(np.uint32) == base.gaps.view(np.uint32)
    return np.asarray((topk.positions == base.positions).all(axis=1) & bits.all(axis=1))


# --- Reading -------------------------------------------------------------------------


def _read_sets(data: Reader, base: TopK, num_vectors: int) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """(S, k) places of the members, and (S,) how many of the base's are missing."""
    k = base.positions.shape[1]
    lacks = np.zeros(base.positions.shape, np.bool_)
    for rows, place in _lack_streams(lacks):  # which goes on from what is filled in here
        lacks[rows, place] = _bounded("a place that is missing or not", decode_integers(data, rows.size), 1)
    missing, members = lacks.sum(axis=1, dtype=np.int8), base.positions.copy()
    for count, rows in enumerate(_by_missing(missing, k)):
        if count and rows.size:
            kept = lacks[rows].argsort(axis=1, kind="stable")
            members[rows] = np.take_along_axis(base.positions[rows], kept, axis=1)
            ranks = decode_subsets(data, rows.size, count, num_vectors - k)
            for named in np.sort(base.positions[rows], axis=1).T:
                ranks += ranks >= named[:, None]  # at or above the j-th named place it is one further
            members[rows, k - count :] = ranks
    return members, missing


def _read_largest(data: Reader, missing: NDArray[np.int8], k: int) -> NDArray[np.int8]:
    largest = np.zeros(len(missing), np.int8)
    for rows in _by_missing(missing, k):
        largest[rows] = _bounded("the largest member", decode_integers(data, rows.size), k - 1)
    return largest


def _read_gaps(
    data: Reader,
    base: TopK,
    members: NDArray[np.int32],
    missing: NDArray[np.int8],
    largest: NDArray[np.int8],
    exponent: int,
) -> TopK:
    """Gaps as moves and values; they give the order of the members."""
    rows, k = members.shape
    gaps = np.zeros((rows, k - 1), np.float32)
    stays = (missing == 0) & (largest == 0)
    for inside in (np.flatnonzero(stays), *_by_missing(np.where(stays, np.int8(-1), missing), k)):
        start = np.where(stays[inside, None], base.gaps[inside], np.float32(0))
        moves = decode_integers(data, start.size).reshape(start.shape)
        values = from_moves(moves, start, exponent)
        if values is None:
            raise WireError(f"selection: a gap of {moves.min()} to {moves.max()} values is beyond the last")
        gaps[inside] = values
    kept = (stays & (gaps.view(np.uint32) == base.gaps.view(np.uint32)).all(axis=1))[:, None]
    first = np.take_along_axis(members, largest[:, None], axis=1)
    later = np.take_along_axis(members, _without(largest, k), axis=1)
    found = _in_order(np.concatenate([first, later], axis=1), gaps)
    return TopK(np.where(kept, base.positions, found.positions), np.where(kept, base.gaps, found.gaps))


def _read_in_full(data: Reader, base: TopK, members: NDArray[np.int32], largest: NDArray[np.int8]) -> TopK:
    """Order and gaps of the rows that differ from the base's."""
    rows, k = members.shape
    differs = np.flatnonzero(_bounded("a row that differs or not", decode_integers(data, rows), 1))
    at = np.zeros((differs.size, k), np.int16)
    at[:, 0] = largest[differs]
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


def _in_order(positions: NDArray[np.int32], gaps: Floats) -> TopK:
    """The later places of each row by their gaps, equal ones by their places: the order that gaps tell."""
    if gaps.shape[1] < 2:
        return TopK(positions, gaps)
    order = np.lexsort((positions[:, 1:], gaps), axis=1)
    later = np.take_along_axis(positions[:, 1:], order, axis=1)
    return TopK(np.concatenate([positions[:, :1], later], axis=1), np.take_along_axis(gaps, order, axis=1))


def _without(largest: NDArray[np.signedinteger], k: int) -> NDArray[np.int8]:
    """(S, k - 1) the members but one."""
    members = np.arange(k - 1, dtype=np.int8)
    return np.asarray(members + (members >= largest[:, None]))
