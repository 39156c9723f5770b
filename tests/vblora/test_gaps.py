"""The values of gaps, and rounding to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora.gaps import COARSEST, GAPS, coarsest, from_moves, nearest_gaps, round_gaps, to_moves


def weight(gaps: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(gaps.astype(np.float64)))


def test_the_values():
    assert len(GAPS) == 131
    assert GAPS[[0, 1, 63, 64, 65, 96, 97, 112, 120, 124, 126, 127, 128, 129, 130]].tolist() == [
        *(0, 1 / 64, 63 / 64, 1, 1 + 1 / 32, 2, 2 + 1 / 16, 3, 4, 5, 6, 7, 9, 13, 21),
    ]


def test_a_step_is_a_small_step_of_a_weight_everywhere():
    assert float(-np.diff(weight(GAPS)).min()) < 0.0065


@pytest.mark.parametrize("exponent", [0, 2, 3, COARSEST])
@pytest.mark.parametrize("base", [0.0, 0.25, 0.3, 3.999, 30.0])
def test_moves_come_back(exponent, base):
    gaps = np.concatenate([GAPS[:: 1 << exponent], [np.float32(base)]]).astype(np.float32)
    start = np.full(len(gaps), base, np.float32)
    moves = to_moves(gaps, start, exponent)
    assert moves[-1] == 0
    np.testing.assert_array_equal(from_moves(moves, start, exponent), gaps)
    assert (np.sign(moves) == np.sign(gaps - start)).all()


def test_a_move_beyond_the_values_is_none():
    base = np.zeros(1, np.float32)
    assert from_moves(np.array([130]), base, 0) is not None
    for move in (131, -1, 2**31 - 1, -(2**31)):
        assert from_moves(np.array([move], np.int32), base, 0) is None


def test_the_coarsest_values_that_do():
    assert coarsest(np.array([0, 1 / 8], np.float32)) == 3
    assert coarsest(np.array([0, 1 / 8, 1 / 64], np.float32)) == 0
    assert coarsest(np.zeros(3, np.float32)) == coarsest(np.zeros(0, np.float32)) == COARSEST
    for gap in (0.3, -0.0, -1.0, 22.0, np.nan, np.inf):
        assert coarsest(np.array([gap], np.float32)) is None


@settings(deadline=None, max_examples=100)
@given(
    st.floats(0, 6.5, width=32), st.sampled_from([0.0, 0.1, 0.3, 5.5, 24.0]), st.sampled_from([0, 2, 3, 6])
)
def test_a_weight_is_right_in_the_mean(gap, base, exponent):
    gaps, start = np.full(4000, gap, np.float32), np.full(4000, base, np.float32)
    drawn = round_gaps(gaps, start, exponent, np.random.default_rng(0))
    told = from_moves(to_moves(drawn, start, exponent), start, exponent)
    np.testing.assert_array_equal(told, drawn)
    values = np.unique(drawn)
    assert len(values) <= 2
    step = 0.0065 * 2**exponent  # of a weight, at most
    assert abs(weight(drawn).mean() - weight(np.array(gap))) <= 0.05 * step


@pytest.mark.parametrize(("exponent", "last"), [(0, 21), (2, 9), (6, 9)])
def test_beyond_the_last_value_is_the_last(exponent, last):
    gaps, base = np.array([50.0, 50.0], np.float32), np.array([0.0, 50.0], np.float32)
    assert round_gaps(gaps, base, exponent, np.random.default_rng(0)).tolist() == [last, 50.0]
    assert weight(np.array(9.0)) < 0.00013


def test_the_nearest():
    assert nearest_gaps(np.array([0.007, 0.009, 6.4, 6.6, 50.0], np.float32)).tolist() == [
        0,
        1 / 64,
        6,
        7,
        21,
    ]
