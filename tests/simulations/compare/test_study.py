"""Which rate is kept."""

from __future__ import annotations

import pytest

from simulations.compare.study import best_rate, tried_rates
from tests.simulations.compare.test_protocol import protocol
from vblora.errors import RunError


def test_why_no_rate_could_be_tried():
    planned = protocol()
    failed = {run: f"rate {run.rate:g} will not do" for run in planned.tuning_runs()}
    told = "none of the rates 0.002, 0.004, 0.008 of lora:8 float32 could .* end: rate 0.002 will not do$"
    with pytest.raises(RunError, match=told):
        tried_rates(planned, [], failed)


def test_the_best_rate_is_kept():
    assert best_rate({1.0: 0.5, 2.0: 0.6, 4.0: 0.7}, 2.0, higher_is_better=True) == 4.0
    assert best_rate({1.0: 0.5, 2.0: 0.6, 4.0: 0.7}, 2.0, higher_is_better=False) == 1.0


def test_of_rates_as_good_the_nearest_to_the_default_is_kept():
    assert best_rate({1.0: 0.6, 2.0: 0.6, 4.0: 0.6}, 2.0, higher_is_better=True) == 2.0
    assert best_rate({1.0: 0.6, 4.0: 0.5, 2.0: 0.6}, 4.0, higher_is_better=True) == 2.0
    assert best_rate({1.0: 0.6, 2.0: 0.6, 4.0: 0.6}, 4.0, higher_is_better=False) == 4.0
