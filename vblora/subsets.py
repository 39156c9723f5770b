"""Sets of numbers: told one number after the other, or packed, whichever is shorter.

Where small numbers are frequent, each is told by how far it lies from the one before. Where all sets are as
likely, no code is shorter than log2 C(n, t) bits for t of n numbers: a set is its rank in the combinatorial
number system, in which c_1 < ... < c_t have the rank C(c_1, 1) + ... + C(c_t, t), rounded up to whole bits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import Reader, decode_integers, encode_integers
from vblora.errors import WireError

__all__ = ["decode_subsets", "encode_subsets", "steps"]

Ints = NDArray[np.int64]

TOLD, PACKED = 0, 1
LONGEST = 62  # bits of a rank


def steps(subsets: Ints) -> Ints:
    """(t, n) of (n, t) rising numbers: the first of each, then how many lie between."""
    return np.asarray(np.diff(subsets, axis=1, prepend=-1).T - 1)


def encode_subsets(subsets: Ints, count: int) -> bytes:
    """Write (n, t) rising numbers of 0 to `count` - 1."""
    rows, size = subsets.shape
    told = b"".join(map(encode_integers, steps(subsets)))
    if _can_pack(count, size) and _packed_size(rows, count, size) < len(told):
        return bytes([PACKED]) + _pack(subsets, count)
    return bytes([TOLD]) + told


def decode_subsets(data: Reader, rows: int, size: int, count: int) -> Ints:
    """Read (rows, size) rising numbers of 0 to `count` - 1.

    Raises:
        WireError: the bytes are none.
    """
    how = data.take(1)[0]
    if how == PACKED and _can_pack(count, size):
        return _unpack(data.take(_packed_size(rows, count, size)), rows, count, size)
    if how != TOLD:
        raise WireError(f"subsets: told in way {how}, expected {TOLD} or {PACKED}")
    subsets = np.full((rows, size), -1, np.int64)
    for place in range(size):
        step = decode_integers(data, rows).astype(np.int64)
        subsets[:, place] = step + subsets[:, place - 1] + 1
        if not ((step >= 0) & (subsets[:, place] < count)).all():
            raise WireError(
                f"subsets: a number of {subsets[:, place].max()}, expected rising ones to {count - 1}"
            )
    return subsets


def _can_pack(count: int, size: int) -> bool:
    """Whether ranks of subsets of `size` of `count` numbers are not too long."""
    return size <= count and math.comb(count, min(size, count // 2)).bit_length() <= LONGEST


def _packed_size(rows: int, count: int, size: int) -> int:
    """Bytes that `rows` subsets take."""
    return -(-rows * _bits(count, size) // 8)


def _pack(subsets: Ints, count: int) -> bytes:
    """Write subsets of 0 to `count` - 1, one a row, rising: rank after rank, the lowest bits first."""
    ranks = np.zeros(len(subsets), np.int64)
    for place, members in enumerate(subsets.T):
        ranks += _choose(count, place + 1)[members]
    planes = np.zeros((len(ranks), _bits(count, subsets.shape[1])), np.uint8)
    for place in range(planes.shape[1]):
        planes[:, place] = ranks >> place & 1
    return np.packbits(planes, bitorder="little").tobytes()


def _unpack(packed: bytes | memoryview, rows: int, count: int, size: int) -> Ints:
    """Read `rows` subsets of `size` of 0 to `count` - 1 back; `packed` has `_packed_size` bytes.

    Raises:
        WireError: a rank that no subset has.
    """
    bits = _bits(count, size)
    planes = np.unpackbits(np.frombuffer(packed, np.uint8), count=rows * bits, bitorder="little")
    ranks = np.zeros(rows, np.int64)
    for place in range(bits):
        ranks |= planes[place::bits].astype(np.int64) << place
    if rows and int(ranks.max()) >= math.comb(count, size):
        raise WireError(f"subsets: rank {ranks.max()}, expected 0 to {math.comb(count, size) - 1}")
    subsets = np.zeros((rows, size), np.int64)
    for place in reversed(range(size)):
        choose = _choose(count, place + 1)
        subsets[:, place] = np.searchsorted(choose, ranks, side="right") - 1
        ranks -= choose[subsets[:, place]]
    return subsets


def _bits(count: int, size: int) -> int:
    """Of a rank."""
    return (math.comb(count, size) - 1).bit_length()


def _choose(count: int, size: int) -> Ints:
    """C(c, size) for c of 0 to count - 1."""
    choose = np.ones(count, np.int64)
    for _ in range(size):  # C(c, i + 1) is the sum of C(d, i) over d < c
        choose = np.cumsum(np.concatenate([np.zeros(1, np.int64), choose[:-1]]))
    return choose
