"""Unsigned integers in as many bits as the largest possible one needs, least significant bit first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["index_bits", "pack_integers", "packed_size", "unpack_integers"]


def index_bits(count: int) -> int:
    """Bits that tell `count` things apart: ceil(log2 count), at least 1."""
    return max(1, (count - 1).bit_length())


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def pack_integers(integers: NDArray[np.int32], bits: int) -> bytes:
    """Pack all of an array, in C order. Integers must lie in 0 to 2^bits - 1."""
    places = np.arange(bits, dtype=np.uint32)
    planes = (integers.reshape(-1, 1).astype(np.uint32) >> places) & np.uint32(1)
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def unpack_integers(packed: bytes | memoryview, count: int, bits: int) -> NDArray[np.int32]:
    """Read `count` integers back. Shape (count,)."""
    planes = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits, bitorder="little")
    places = np.arange(bits, dtype=np.int64)
    integers: NDArray[np.int32] = (
        (planes.reshape(count, bits).astype(np.int64) << places).sum(axis=1).astype(np.int32)
    )
    return integers
