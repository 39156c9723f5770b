"""What is dropped, and that nobody forgets it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vblora.make_golden import BLUEPRINT
from tests.vblora.test_wire import trained
from vblora.errors import ConfigError
from vblora.frame import section_bytes
from vblora.rounding import (
    GRID,
    WIRES,
    WireSettings,
    from_grid,
    on_grid,
    round_state,
    round_update,
    wire_keys,
    wire_settings,
)
from vblora.spec import Blueprint, Linear, VBLoRASpec
from vblora.state import State, TopK, Update
from vblora.wire import encode_update, initial

BIG = Blueprint(VBLoRASpec(rank=4, num_vectors=64, vector_length=64), (Linear("a", 512, 512),))


def noise() -> np.random.Generator:
    return np.random.default_rng(3)


def change(state: State, scale: float = 0.01) -> Update:
    return trained(state, BIG, 1, scale)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0, 8.0])
def test_the_step_is_set_by_the_bits_it_costs(bits, stochastic):
    state = initial(BIG)
    wire = WireSettings(up_bits=bits, stochastic=stochastic)
    rounded, _ = round_update(change(state), state, wire, {}, noise())
    sent = 8 * section_bytes(encode_update(rounded, BIG, state))["bank"] / rounded.dense["bank"].size
    assert sent == pytest.approx(bits, abs=0.35)


@pytest.mark.parametrize("bits", [2.0, 4.0, 16.0])
def test_with_feedback_nothing_is_lost_over_rounds(bits):
    state = initial(BIG)
    wire = WireSettings(up_bits=bits, feedback=True)
    wanted = np.zeros_like(state.dense["bank"])
    sent, waiting = wanted.copy(), {}
    for turn in range(20):
        exact = replace(change(state), dense={"bank": trained(state, BIG, turn).dense["bank"]})
        wanted += exact.dense["bank"]
        rounded, waiting = round_update(exact, state, wire, waiting, noise())
        sent += rounded.dense["bank"]
    np.testing.assert_allclose(sent + waiting["bank"], wanted, atol=1e-6)


def test_stochastic_rounding_is_right_in_the_mean():
    state = initial(BIG)
    wire = WireSettings(up_bits=2.0, stochastic=True)
    exact, draws = change(state), np.random.default_rng(0)
    turns = [round_update(exact, state, wire, {}, draws)[0] for _ in range(200)]
    mean = np.mean([turn.dense["bank"] for turn in turns], axis=0)
    step = turns[0].steps["bank"]
    assert np.abs(mean - exact.dense["bank"]).max() < 0.25 * step
    gaps = np.mean([turn.topk.gaps for turn in turns], axis=0)
    assert np.abs(gaps - exact.topk.gaps).mean() < 0.002


def test_what_is_not_kept_waits():
    state = initial(BIG)
    wire = WireSettings(up_bits=4.0, head_bits=4.0, keep=0.1, feedback=True)
    exact = change(state)
    rounded, waiting = round_update(exact, state, wire, {}, noise())
    assert 0.05 < np.mean(rounded.dense["bank"] != 0) <= 0.11
    np.testing.assert_array_equal(rounded.dense["bank"] + waiting["bank"], exact.dense["bank"])


def test_a_row_that_did_not_change_keeps_the_bits_of_the_reference():
    state = initial(BIG)
    exact = change(state)
    same = exact.topk.same_rows(state.topk)
    assert 0 < same.sum() < len(same)
    rounded, _ = round_update(exact, state, WIRES["default"], {}, noise())
    assert rounded.topk.same_rows(state.topk)[same].all()


def test_a_diverged_update_is_sent_as_it_is():
    state = initial(BIG)
    exact = change(state)
    exact.dense["bank"][0, 0] = np.nan
    rounded, waiting = round_update(exact, state, WIRES["default"], {}, noise())
    assert np.isnan(rounded.dense["bank"][0, 0])
    assert waiting == {}


# --- States --------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(-(1 << 22), 1 << 22), min_size=24, max_size=24))
def test_the_grid_tells_its_steps(steps):
    start = initial(BLUEPRINT).dense["bank"]
    whole = np.array(steps).reshape(start.shape)
    np.testing.assert_array_equal(on_grid(from_grid(start, whole), start), whole)


def test_off_the_grid():
    start = initial(BIG).dense["bank"]
    assert on_grid(start + np.float32(GRID / 3), start) is None
    assert on_grid(start * np.float32(np.inf), start) is None
    zeros = np.zeros(8, np.float32)
    assert on_grid(zeros, zeros) is not None
    assert on_grid(-zeros, zeros) is None  # adding steps gives 0


def test_states_keep_what_rounding_drops():
    start = initial(BIG)
    reference, waiting, total = start, {}, np.zeros_like(start.dense["bank"], np.float64)
    for turn in range(10):
        moved = np.random.default_rng(turn).normal(0, 0.01 / (turn + 1), total.shape).astype(np.float32)
        total += moved
        exact = State(turn + 1, {"bank": reference.dense["bank"] + moved}, start.topk)
        reference, waiting = round_state(exact, reference, start, WIRES["default"], waiting)
        assert on_grid(reference.dense["bank"], start.dense["bank"]) is not None
    held = reference.dense["bank"].astype(np.float64) + waiting["bank"] - start.dense["bank"]
    np.testing.assert_allclose(held, total, atol=1e-6)


def test_a_mean_that_changed_nothing_is_the_reference():
    start = initial(BIG)
    exact = replace(start, version=1)
    state, _ = round_state(exact, start, start, WIRES["default"], {})
    assert np.array_equal(state.dense["bank"], start.dense["bank"])
    assert state.topk is not None
    assert state.topk.same_rows(start.topk).all()


def test_a_section_that_nobody_trained_is_still_while_something_waits():
    start = initial(BIG)
    moved = State(1, {"bank": start.dense["bank"] + np.float32(0.003)}, start.topk)
    reference, waiting = round_state(moved, start, start, WIRES["smallest"], {})
    assert waiting["bank"].any()
    state, later = round_state(replace(reference, version=2), reference, start, WIRES["smallest"], waiting)
    assert state.dense["bank"] is reference.dense["bank"]
    assert later["bank"] is waiting["bank"]


def test_a_state_with_a_large_number_goes_whole_with_what_waited():
    start = initial(BIG)
    far = State(1, {"bank": start.dense["bank"] + np.float32(100.3)}, start.topk)
    waits = {"bank": np.full_like(far.dense["bank"], 0.25)}
    state, waiting = round_state(far, start, start, WIRES["default"], waits)
    np.testing.assert_array_equal(state.dense["bank"], far.dense["bank"] + np.float32(0.25))
    assert waiting == {}


def test_a_state_returns_to_the_grid():
    """One large number in one round must not send the section whole for the rest of the run."""
    start = initial(BIG)
    far = {"bank": start.dense["bank"] + change(start).dense["bank"]}
    far["bank"][0, 0] = 8.5
    away, _ = round_state(State(1, far, start.topk), start, start, WIRES["default"], {})
    near = State(2, {"bank": start.dense["bank"] + change(start).dense["bank"]}, start.topk)
    back, waiting = round_state(near, away, start, WIRES["default"], {})
    assert on_grid(away.dense["bank"], start.dense["bank"]) is None
    assert on_grid(back.dense["bank"], start.dense["bank"]) is not None
    assert np.abs(waiting["bank"]).max() <= GRID
    np.testing.assert_allclose(back.dense["bank"] + waiting["bank"], near.dense["bank"], atol=1e-7)


def test_a_change_too_small_for_a_step_is_finite():
    state = initial(BIG)
    tiny = np.zeros_like(state.dense["bank"])
    tiny[0, :20] = 1e-43
    exact = Update(0, state.digest, 1, {"bank": tiny}, state.topk)
    rounded, _ = round_update(exact, state, WIRES["default"], {}, noise())
    assert rounded.steps["bank"] > 0
    assert np.isfinite(rounded.dense["bank"]).all()


def test_gaps_stay_in_order():
    spec = VBLoRASpec(rank=4, num_vectors=64, vector_length=64, topk=4)
    start = initial(replace(BIG, spec=spec))
    gaps = np.sort(np.random.default_rng(0).exponential(1, start.topk.gaps.shape), axis=1).astype(np.float32)
    exact = Update(0, start.digest, 1, {"bank": start.dense["bank"]}, TopK(start.topk.positions, gaps))
    found = round_update(exact, start, WIRES["default"], {}, noise())[0].topk
    assert (np.diff(found.gaps, axis=1) >= 0).all()
    assert (found.gaps >= 0).all()


# --- Settings ------------------------------------------------------------------------


def test_presets_and_parts():
    assert wire_settings({}) == wire_settings(wire_keys()) == WIRES["default"]
    assert wire_settings({"wire": "lossless"}).lossless
    found = wire_settings({"wire": "smallest", "wire-up-bits": 3, "wire-feedback": "off"})
    assert found == replace(WIRES["smallest"], up_bits=3.0, feedback=False)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"wire": "tiny"}, "wire is 'tiny', expected one of lossless, default, smallest"),
        ({"wire-up-bits": 20.0}, "up-bits is 20, expected 0.5 to 12, 16 or 32"),
        ({"wire-down-bits": 16.0}, "down-bits is 16, expected 0.5 to 12, or 32"),
        ({"wire-keep": 2.0}, "keep is 2, expected above 0, at most 1"),
        ({"wire": "lossless", "wire-keep": 0.5}, "keep is 0.5: it saves bytes only with"),
        ({"wire-feedback": "yes"}, "wire-feedback is 'yes', expected on, off or auto"),
        ({"wire-up-bits": "4"}, "wire-up-bits is '4', expected a number"),
    ],
)
def test_settings_that_cannot_be(config, fault):
    with pytest.raises(ConfigError, match=fault):
        wire_settings(config)
