"""The server's step, against the formulas written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fl_server.stepping import FLOOR, SECOND, StepSettings, step_keys, step_settings, step_towards
from vblora.errors import ConfigError
from vblora.state import State, TopK

TOPK = TopK(np.array([[0, 1]], np.int32), np.array([[0.5]], np.float32))


def state(*bank: float) -> State:
    return State(3, {"bank": np.array(bank, np.float32)}, TOPK)


def test_a_plain_mean_is_taken_as_it_is():
    mean = state(1, 2)
    assert step_towards(mean, state(0, 0), {}, StepSettings()) == (mean, {})


def test_a_rate_scales_the_change():
    stepped, moments = step_towards(state(1, 2), state(0, 4), {}, StepSettings(rate=0.5))
    np.testing.assert_allclose(stepped.dense["bank"], [0.5, 3])
    assert moments == {}
    assert stepped.topk is TOPK


def test_momentum_adds_to_the_last_move():
    settings = StepSettings("momentum", rate=0.5, decay=0.8)
    first, moments = step_towards(state(1, 2), state(0, 0), {}, settings)
    np.testing.assert_allclose(first.dense["bank"], [0.5, 1])
    second, moments = step_towards(state(1, 0), state(0, 0), moments, settings)
    np.testing.assert_allclose(moments["first/bank"], [1.8, 1.6], rtol=1e-6)
    np.testing.assert_allclose(second.dense["bank"], [0.9, 0.8], rtol=1e-6)


def test_adam_divides_by_the_root_of_the_squares():
    settings = StepSettings("adam", rate=0.1, decay=0.9)
    moments: dict = {}
    first = second = 0.0
    for change in (2.0, -1.0, 0.5):
        stepped, moments = step_towards(state(change), state(0), moments, settings)
        first, second = 0.9 * first + 0.1 * change, SECOND * second + (1 - SECOND) * change**2
        np.testing.assert_allclose(stepped.dense["bank"], [0.1 * first / (second**0.5 + FLOOR)], rtol=1e-5)


def test_numbers_stay_float32():
    stepped, moments = step_towards(state(1, 2), state(0, 0), {}, StepSettings("adam", rate=0.1))
    assert {array.dtype for array in (*stepped.dense.values(), *moments.values())} == {np.dtype(np.float32)}


def test_settings_from_a_config():
    assert step_settings({}) == StepSettings()
    assert step_settings(step_keys()) == StepSettings()
    assert step_settings({"server-optimizer": "momentum", "server-rate": 1}) == StepSettings("momentum", 1.0)
    with pytest.raises(ConfigError, match=r"server-rate is 'x', expected a number; server-decay is True"):
        step_settings({"server-rate": "x", "server-decay": True})
    with pytest.raises(ConfigError, match=r"server-optimizer is 'sgd'.*server-rate is 0.*server-decay is 1"):
        step_settings({"server-optimizer": "sgd", "server-rate": 0, "server-decay": 1})
