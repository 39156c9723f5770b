"""Statistics over seeds, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest

from simulations.compare.scores import (
    Reached,
    bytes_to_target,
    paired,
    reached,
    spread,
    t_975,
    target_of,
)


def test_mean_and_spread():
    assert spread([0.25]).std is None
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)


def test_quantiles_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 60, 120, 1000):
        assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


def test_paired_differences_by_hand():
    """0.1, 0.2, 0.3: mean 0.2, deviation 0.1, so the half width is 4.303 * 0.1 / sqrt(3)."""
    found = paired({0: 0.5, 1: 0.7, 2: 0.9, 9: 0.0}, {2: 0.6, 1: 0.5, 0: 0.4, 8: 1.0})
    assert found is not None
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (found.mean, found.n) == (pytest.approx(0.2), 3)
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert not found.shows_difference


def test_intervals_as_scipy_gives_them():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [0.81, 0.84, 0.80, 0.86, 0.83], [0.82, 0.86, 0.83, 0.86, 0.85]
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert found is not None
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == (
        pytest.approx(expected.low, abs=1e-5),
        pytest.approx(expected.high, abs=1e-5),
    )
    assert found.shows_difference


def test_one_seed_has_no_interval():
    found = paired({3: 0.5}, {3: 0.25})
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (0.25, None, None, 1)
    assert not found.shows_difference
    assert paired({0: 0.5}, {1: 0.5}) is None


def test_the_first_evaluation_that_is_good_enough_counts():
    """Not the point between two evaluations, and not a later one that is better."""
    curve = [(0, 0.5), (10, 0.7), (20, 0.69), (30, 0.9)]
    assert bytes_to_target(curve, 0.7, higher_is_better=True) == 10
    assert bytes_to_target(curve, 0.71, higher_is_better=True) == 30
    assert bytes_to_target(curve, 0.91, higher_is_better=True) is None
    assert bytes_to_target(curve, 0.4, higher_is_better=True) == 0
    assert bytes_to_target([(0, 3.0), (10, 2.5)], 2.5, higher_is_better=False) == 10
    assert bytes_to_target([], 0.5, higher_is_better=True) is None


def test_a_share_of_a_score():
    assert target_of(0.8, 0.95, higher_is_better=True) == pytest.approx(0.76)
    assert target_of(2.0, 0.8, higher_is_better=False) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([10, 30, 20], Reached(3, 3, 20)),
        ([10, None, 20], Reached(2, 3, 20)),
        ([10, None], Reached(1, 2, None)),
        ([40, 10, 30, 20], Reached(4, 4, 30)),
        ([None, None, 5], Reached(1, 3, None)),
        ([], Reached(0, 0, None)),
    ],
)
def test_seeds_that_come_to_a_target(taken: list[float | None], expected: Reached):
    """Who does not come there took infinitely many bytes; the median is of a run, not between two."""
    assert reached(taken) == expected
