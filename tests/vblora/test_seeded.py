"""Numbers that every machine must draw alike."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vblora import make_golden, make_quantiles
from vblora import seeded

SEEDS = st.integers(0, (1 << 62) - 1)
ROWS = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4).map(lambda rows: np.array(rows, np.int64))


def test_golden_numbers():
    """A change here breaks every saved run and every site of another version: see `make_golden`."""
    assert make_golden.draws() == json.loads((make_golden.GOLDEN / "seeded.json").read_text())


def test_the_committed_table_is_what_its_script_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_quantiles", str(tmp_path / "quantiles.json")])
    make_quantiles.main()
    made = json.loads((tmp_path / "quantiles.json").read_text())
    held = {name: table.reshape(-1, 65).tolist() for name, table in seeded._tables().items()}
    assert made == held


@settings(deadline=None, max_examples=80)
@given(SEEDS, ROWS, st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1000, 2048, 4097])))
def test_order_is_a_permutation_and_a_prefix_of_itself(seed, rows, h):
    whole = seeded.order(seed, rows, h, h)
    assert (np.sort(whole, axis=1) == np.arange(h)).all()
    width = max(1, h // 3)
    assert (seeded.order(seed, rows, h, width) == whole[:, :width]).all()


@settings(deadline=None, max_examples=80)
@given(
    SEEDS,
    ROWS,
    st.one_of(st.integers(1, 70), st.sampled_from([1000, 2048, 1 << 14])),
    st.sampled_from([1e-4, 0.01, 0.1, 10.0]),
)
def test_values_fall_strictly_and_are_a_prefix_of_themselves(seed, rows, h, std):
    whole = seeded.values(seed, rows, h, h, std)
    assert np.isfinite(whole).all()
    assert (np.diff(whole, axis=1) < 0).all()
    width = max(1, h // 3)
    assert (seeded.values(seed, rows, h, width, std) == whole[:, :width]).all()


def test_values_fall_strictly_where_the_grid_is_crowded():
    """A million normal numbers have neighbours in one step of 2^-20."""
    whole = seeded.values(0, np.arange(2), 1 << 20, 1 << 20, 0.01)
    assert (np.diff(whole, axis=1) < 0).all()


def test_numbers_do_not_depend_on_how_they_are_cut(monkeypatch):
    rows = np.arange(50)
    order, values = seeded.order(1, rows, 300, 40), seeded.values(1, rows, 300, 40, 0.1)
    uniform = seeded.uniform(1, "rows", 0, 1000, 1.0)
    monkeypatch.setattr(seeded, "CHUNK", 90)  # two rows at a time
    assert (seeded.order(1, rows, 300, 40) == order).all()
    assert (seeded.values(1, rows, 300, 40, 0.1) == values).all()
    picked = np.array([49, 3, 3])
    assert (seeded.order(1, picked, 300, 40) == order[picked]).all()
    assert (seeded.values(1, picked, 300, 40, 0.1) == values[picked]).all()
    assert (seeded.uniform(1, "rows", 700, 300, 1.0) == uniform[700:]).all()


def test_no_rows_draw_nothing():
    none = np.arange(0)
    assert seeded.order(0, none, 10, 4).shape == (0, 4)
    assert seeded.values(0, none, 10, 4, 0.1).shape == (0, 4)
    assert seeded.uniform(0, "bank", 0, 0, 1.0).shape == (0,)


def test_seeds_streams_and_rows_differ():
    rows = np.arange(200)
    order = seeded.order(0, rows, 2048, 16)
    assert len(np.unique(order, axis=0)) == 200
    assert (order == seeded.order(1, rows, 2048, 16)).mean() < 0.01
    values = seeded.values(0, rows, 2048, 4, 0.1)
    assert len(np.unique(values[:, 0])) == 200
    assert not np.isin(seeded.uniform(0, "bank", 0, 99, 1.0), seeded.uniform(0, "head", 0, 99, 1.0)).any()


def test_uniform_is_uniform():
    drawn = seeded.uniform(0, "bank", 0, 1 << 18, 0.02).astype(np.float64) / 0.02
    assert abs(drawn).max() < 1
    assert abs(drawn.mean()) < 5 / np.sqrt(3 * drawn.size)
    counts = np.histogram(drawn, 64, (-1, 1))[0]
    assert _chi_square(counts) < 130  # 63 degrees of freedom: beyond 130 once in a million
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("h", [2, 3, 8, 10, 90, 256])
def test_every_vector_is_as_likely_at_every_place(h):
    rows = 400 * h
    order = seeded.order(0, np.arange(rows), h, min(h, 3))
    for place in order.T:
        counts = np.bincount(place, minlength=h)
        assert _chi_square(counts) < h - 1 + 6 * np.sqrt(2 * h)
    if h > 3:  # the second place given the first: no vector follows another more often
        pairs = (order[:, 1] - order[:, 0]) % h
        assert _chi_square(np.bincount(pairs, minlength=h)[1:]) < h - 2 + 6 * np.sqrt(2 * h)


def test_values_are_order_statistics_of_normal_numbers():
    """Against numpy's normal numbers, sorted: means within five standard errors, and the spread too."""
    h, rows = 128, 4000
    drawn = seeded.values(0, np.arange(rows), h, h, 0.1).astype(np.float64) / 0.1
    sampled = -np.sort(-np.random.default_rng(0).standard_normal((rows, h)), axis=1)
    error = np.sqrt(2 / rows) * sampled.std(axis=0)
    assert (abs(drawn.mean(axis=0) - sampled.mean(axis=0)) < 5 * error).all()
    assert (abs(drawn.std(axis=0) / sampled.std(axis=0) - 1) < 5 / np.sqrt(rows)).all()
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert abs(drawn.std() - 1) < 5 / np.sqrt(drawn.size)
    gaps = drawn[:, 0] - drawn[:, 1]
    assert abs(gaps.mean() / (sampled[:, 0] - sampled[:, 1]).mean() - 1) < 0.1


def test_a_row_of_one_is_a_normal_number():
    drawn = seeded.values(0, np.arange(40_000), 1, 1, 1.0).astype(np.float64)
    assert abs(drawn.mean()) < 5 / 200
    assert abs(drawn.std() - 1) < 5 / 200
    assert 3.5 < drawn.max() < 6.5
    assert -6.5 < drawn.min() < -3.5


def _chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())
