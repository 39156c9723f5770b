"""Integers in few bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora.packing import index_bits, pack_integers, packed_size, unpack_integers


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 1 << 20), st.integers(0, 200), st.integers(0, 1 << 32))
def test_what_was_packed_comes_back(count_of_things, length, seed):
    bits = index_bits(count_of_things)
    integers = np.random.default_rng(seed).integers(0, count_of_things, length).astype(np.int32)
    packed = pack_integers(integers, bits)
    assert len(packed) == packed_size(length, bits)
    back = unpack_integers(packed, length, bits)
    assert back.dtype == np.int32
    assert (back == integers).all()


@pytest.mark.parametrize(
    ("count", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (2048, 11), (1 << 20, 20)]
)
def test_bits_are_the_logarithm(count, bits):
    assert index_bits(count) == bits


def test_the_first_integer_lies_in_the_lowest_bits():
    assert pack_integers(np.array([1, 2, 3, 4], np.int32), 3) == bytes([0b11_010_001, 0b1000])
    assert pack_integers(np.array([[5], [6]], np.int32), 11) == (5 | 6 << 11).to_bytes(3, "little")


def test_a_view_is_packed_in_its_own_order():
    integers = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert unpack_integers(pack_integers(integers.T, 4), 12, 4).tolist() == integers.T.ravel().tolist()


def test_packed_bytes_may_be_a_memoryview():
    packed = memoryview(b"xx" + pack_integers(np.array([9, 8], np.int32), 5))[2:]
    assert unpack_integers(packed, 2, 5).tolist() == [9, 8]
