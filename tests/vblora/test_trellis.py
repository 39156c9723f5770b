"""Rounding along a trellis: it can be walked again, and it comes nearer than plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora.entropy import Reader
from vblora.lanes import decode_lanes, encode_lanes
from vblora.trellis import NEXT, lane_length, round_lanes, walk


def test_lanes_are_powers_of_two_near_the_root():
    counts = [1, 10, 63, 64, 255, 256, 770, 4096, 32_768, 524_288]
    assert [lane_length(count) for count in counts] == [8, 8, 8, 8, 8, 16, 16, 64, 128, 128]


def test_every_state_has_two_ways_in():
    assert np.bincount(NEXT.reshape(-1)).tolist() == [2] * 8


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 1500), st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e5]), st.integers(0, 1 << 20))
def test_what_was_rounded_can_be_walked(count, spread, seed):
    values = np.random.default_rng(seed).normal(0, spread, count).astype(np.float32)
    multiples = round_lanes(values, 0.5)
    assert multiples.shape == values.shape
    assert np.abs(multiples * 0.5 - values).max() <= 1.5 + 1e-6 * spread
    length = lane_length(count)
    lanes = np.zeros(-(-count // length) * length, np.int64)
    lanes[:count] = multiples
    found = walk(lanes.reshape(-1, length))
    assert found is not None
    numbers, odd = found
    np.testing.assert_array_equal(2 * numbers - np.sign(numbers) * odd, lanes.reshape(-1, length))


@pytest.mark.parametrize("step", [0.05, 0.3, 0.6])
def test_it_comes_nearer_at_the_same_cost(step):
    """By 0.8 decibels at least; a bit is worth 6.02."""
    values = np.random.default_rng(0).normal(0, 1, (256, 128)).astype(np.float32)
    cost, error = [], []
    for size, multiples in ((step, round_lanes(values, step)), (2 * step, np.rint(values / (2 * step)))):
        cost.append(8 * len(encode_lanes(multiples.astype(np.int64))) / values.size)
        error.append(10 * np.log10(np.mean((values - multiples * size) ** 2)))
    assert error[1] - error[0] - 6.02 * (cost[0] - cost[1]) > 0.8


def test_zeros_stay_zeros_and_cost_nothing():
    zeros = np.zeros((64, 128), np.float32)
    assert not round_lanes(zeros, 0.1).any()
    assert len(encode_lanes(round_lanes(zeros, 0.1))) < 8


def test_plain_multiples_are_told_from_walked_ones():
    plain = np.random.default_rng(0).integers(-4, 5, 500)
    assert encode_lanes(plain)[0] == 0
    assert encode_lanes(round_lanes(plain.astype(np.float32), 1.0))[0] == 1
    np.testing.assert_array_equal(decode_lanes(Reader(encode_lanes(plain)), 500), plain)
