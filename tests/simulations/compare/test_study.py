"""Which rate is kept."""

from __future__ import annotations

from simulations.compare.study import best_rate


def test_the_best_rate_is_kept():
    assert best_rate({1.0: 0.5, 2.0: 0.6, 4.0: 0.7}, 2.0, higher_is_better=True) == 4.0
    assert best_rate({1.0: 0.5, 2.0: 0.6, 4.0: 0.7}, 2.0, higher_is_better=False) == 1.0


def test_of_rates_as_good_the_nearest_to_the_default_is_kept():
    assert best_rate({1.0: 0.6, 2.0: 0.6, 4.0: 0.6}, 2.0, higher_is_better=True) == 2.0
    assert best_rate({1.0: 0.6, 4.0: 0.5, 2.0: 0.6}, 4.0, higher_is_better=True) == 2.0
    assert best_rate({1.0: 0.6, 2.0: 0.6, 4.0: 0.6}, 4.0, higher_is_better=False) == 4.0
