"""Sets of numbers, told or packed."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora.entropy import Reader
from vblora.errors import WireError
from vblora.subsets import PACKED, TOLD, decode_subsets, encode_subsets, steps


def back(subsets: np.ndarray, count: int) -> tuple[int, np.ndarray]:
    """How they are written, and what is read."""
    blob = encode_subsets(subsets, count)
    data = Reader(blob + b"rest")
    found = decode_subsets(data, *subsets.shape, count)
    assert bytes(data.take(len(data))) == b"rest"
    return blob[0], found


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 200), st.integers(1, 8), st.integers(0, 3000), st.booleans(), st.integers(0, 1 << 20))
def test_they_come_back(rows, size, more, near, seed):
    rng, count = np.random.default_rng(seed), size + more
    reach = min(count, size + 2) if near else count
    drawn = np.argsort(rng.random((rows, reach)), axis=1)[:, :size]
    np.testing.assert_array_equal(back(np.sort(drawn, axis=1), count)[1], np.sort(drawn, axis=1))


@pytest.mark.parametrize(("count", "size"), [(6, 2), (7, 3), (9, 9), (4, 1)])
def test_all_of_them(count, size):
    """Each once: no code is shorter than a rank in whole bits."""
    subsets = np.array(list(itertools.combinations(range(count), size)), np.int64).reshape(-1, size)
    _, found = back(subsets, count)
    np.testing.assert_array_equal(found, subsets)
    bits = (math.comb(count, size) - 1).bit_length()
    assert len(encode_subsets(subsets, count)) <= 1 + -(-len(subsets) * bits // 8)


def test_even_ones_are_packed_and_near_ones_told():
    rng = np.random.default_rng(0)
    even = np.sort(np.argsort(rng.random((2000, 100)), axis=1)[:, :3], axis=1)
    near = np.minimum(np.sort(even, axis=1), np.arange(3) + 4)
    assert [back(subsets, 100)[0] for subsets in (even, near)] == [PACKED, TOLD]


def test_ranks_that_are_too_long_are_told():
    subsets = np.sort(np.argsort(np.random.default_rng(0).random((50, 4000)), axis=1)[:, :16], axis=1)
    how, found = back(subsets, 4000)
    assert how == TOLD
    np.testing.assert_array_equal(found, subsets)
    with pytest.raises(WireError, match="16 of 4000 numbers are packed, whose ranks may be too long"):
        decode_subsets(Reader(bytes([PACKED]) + bytes(999)), 50, 16, 4000)
    wide = np.array([np.delete(np.arange(200), 7)])  # C(200, 199) is small, C(200, 100) is not
    np.testing.assert_array_equal(back(wide, 200)[1], wide)


def test_steps():
    assert steps(np.array([[0, 1, 5], [2, 7, 8]])).tolist() == [[0, 2], [0, 4], [3, 0]]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 40))
def test_noise_is_refused_or_sets(noise, rows, size, more):
    with suppress(WireError):
        found = decode_subsets(Reader(noise), rows, size, size + more)
        assert found.shape == (rows, size)
        assert ((found >= 0) & (found < size + more)).all()
        assert (np.diff(found, axis=1) > 0).all()
