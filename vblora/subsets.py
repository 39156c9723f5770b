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
Numbers = NDArray[np.int32]

TOLD, PACKED = 0, 1
LONGEST = 62  # bits of a rank
BLOCK = 1 << 12  # ranks taken apart at once


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


def decode_subsets(data: Reader, rows: int, size: int, count: int) -> Numbers:
    """Read (rows, size) rising numbers of 0 to `count` - 1, in the room of twice them and a block.

    Raises:
        WireError: the bytes are none.
    """
    how = data.take(1)[0]
    if how == PACKED:
        if not _can_pack(count, size):
            raise WireError(f"subsets: {size} of {count} numbers are packed, whose ranks may be too long")
        return _unpack(data.take(_packed_size(rows, count, size)), rows, count, size)
    if how != TOLD:
        raise WireError(f"subsets: told in way {how}, expected {TOLD} or {PACKED}")
    subsets, last = np.empty((rows, size), np.int32), np.full(rows, -1, np.int32)
    for place in range(size):
        step = decode_integers(data, rows)
        wrong = (step < 0) | (step > count - 2 - last)
        if wrong.any():
            found = int(step[wrong][0]) + int(last[wrong][0]) + 1
            raise WireError(f"subsets: a number of {found}, expected rising ones to {count - 1}")
        last = step + last + 1
        subsets[:, place] = last
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


def _unpack(packed: bytes | memoryview, rows: int, count: int, size: int) -> Numbers:
    """Read `rows` subsets of `size` of 0 to `count` - 1 back; `packed` has `_packed_size` bytes.

    Raises:
        WireError: a rank that no subset has.
    """
    bits, most = _bits(count, size), math.comb(count, size)
    choose = [_choose(count, place + 1) for place in range(size)]
    subsets = np.empty((rows, size), np.int32)
    data = np.frombuffer(packed, np.uint8)
    for start in range(0, rows, BLOCK):  # a block of ranks begins with a byte
        block = subsets[start : start + BLOCK]
        part = data[start * bits // 8 : -(-(start + BLOCK) * bits // 8)]
        planes = np.unpackbits(part, count=len(block) * bits, bitorder="little")
        ranks = np.zeros(len(block), np.int64)
        for place in range(bits):
            ranks |= planes[place::bits].astype(np.int64) << place
        if int(ranks.max()) >= most:
            raise WireError(f"subsets: rank {ranks.max()}, expected 0 to {most - 1}")
        for place in reversed(range(size)):
            found = np.searchsorted(choose[place], ranks, side="right") - 1
            ranks -= choose[place][found]
            block[:, place] = found
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
