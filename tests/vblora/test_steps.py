"""The step that is found costs the bits that were asked for, and is never finer than numbers can be told."""

from __future__ import annotations

import numpy as np
import pytest

from vblora.lanes import encode_lanes
from vblora.steps import FINEST, Rounding, find_step
from vblora.trellis import round_lanes


@pytest.mark.parametrize("rounding", ["nearest", "trellis"])
@pytest.mark.parametrize("bits", [0.5, 1.25, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("heavy", [False, True])
def test_a_step_costs_its_bits(rounding: Rounding, bits: float, heavy: bool):
    rng = np.random.default_rng(0)
    change = (rng.standard_t(3, 40_000) if heavy else rng.normal(0, 1, 40_000)).astype(np.float32) * 1e-3
    step = find_step(change, bits, rounding)
    whole = round_lanes(change, step) if rounding == "trellis" else np.rint(change / step).astype(np.int64)
    off = 0.25 if rounding == "trellis" else 0.12  # its walk is not in the estimate
    assert 8 * len(encode_lanes(whole)) / change.size == pytest.approx(bits, abs=off)


def test_few_numbers_among_zeros_are_told_finely_but_not_beyond():
    change = np.zeros(20_000, np.float32)
    change[::97] = np.random.default_rng(0).normal(0, 1, change[::97].size)
    step = find_step(change, 8.0)
    assert step == pytest.approx(np.abs(change).max() * 2.0**-FINEST)


def test_few_lanes_that_move_are_not_overlooked():
    """Of a large bank of which few vectors moved: found on a sample, which must hold some of them."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        change = np.zeros((2048, 256), np.float32)
        rows = rng.choice(2048, 20, replace=False)
        change[rows] = rng.normal(0, 1e-3, (20, 256))
        step = find_step(change, 3.0)
        assert np.abs(np.rint(change / step) * step - change).max() < 1e-5
        assert 8 * len(encode_lanes(np.rint(change / step))) / change.size < 3


def test_where_nothing_changes():
    assert find_step(np.zeros(100, np.float32), 3.0) == 1.0
