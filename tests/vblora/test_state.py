"""States from the seed, digests, and updates that must never reach the mean."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora import seeded
from vblora.errors import UpdateError
from vblora.spec import (
    BankOnlySpec,
    Blueprint,
    FFALoRASpec,
    HeadTensor,
    Linear,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
    VBLoRASpec,
)
from vblora.state import State, TopK, Update, check_update, initial_state, mixture_weights

LINEARS = (Linear("a", 8, 12), Linear("b", 20, 8))
HEAD = (HeadTensor("head.weight", (3, 8)), HeadTensor("head.bias", (3,)))
VBLORA = Blueprint(VBLoRASpec(rank=2, num_vectors=16, vector_length=4, topk=3, seed=5), LINEARS, HEAD)
LORA = Blueprint(LoRASpec(rank=2, seed=5), LINEARS, HEAD)


def make_update(blueprint: Blueprint) -> Update:
    state = initial_state(blueprint)
    dense = {name: np.full_like(array, 0.5) for name, array in state.dense.items()}
    return Update(0, state.digest, 10, dense, state.topk)


# --- Drawn from the seed -------------------------------------------------------------


def test_a_vblora_state_starts_at_the_seeds():
    state = initial_state(VBLORA)
    assert state.version == 0
    assert state.dense["bank"].shape == (16, 4)
    assert np.abs(state.dense["bank"]).max() < 0.02
    rows = VBLORA.rows
    assert (state.topk.positions == [0, 1, 2]).all()
    seeds = seeded.values(5, np.arange(rows), 16, 16, 0.1)
    np.testing.assert_array_equal(state.topk.gaps, seeds[:, :1] - seeds[:, 1:3])
    assert initial_state(VBLORA).digest == state.digest


def test_a_lora_state_starts_with_a_uniform_and_b_zero():
    rows = initial_state(LORA).dense["rows"]
    assert rows.shape == (24, 4)
    for part in LORA.slices:
        a, b = rows[part.start : part.middle], rows[part.middle : part.stop]
        bound = part.linear.in_features**-0.5
        assert 0.5 * bound < np.abs(a).max() < bound
        assert not b.any()
    a_parts = [rows[part.start : part.middle].ravel()[:8] for part in LORA.slices]
    assert not np.intersect1d(a_parts[0] * 8**0.5, a_parts[1] * 20**0.5).size


def test_a_head_starts_like_a_classifier():
    head = initial_state(VBLORA).dense["head"]
    assert head.shape == (27,)
    assert (np.abs(head[:24]) < 0.02 * 3**0.5).all()
    assert (head[:24] != 0).all()
    assert not head[24:].any()
    large = replace(VBLORA, head=(HeadTensor("w", (300, 300)),))
    assert abs(initial_state(large).dense["head"].std() / 0.02 - 1) < 0.01


def test_states_of_two_seeds_differ_everywhere():
    other = replace(VBLORA, spec=replace(VBLORA.spec, seed=6))
    one, two = initial_state(VBLORA), initial_state(other)
    assert not (one.dense["bank"] == two.dense["bank"]).any()
    assert not (one.dense["head"][:24] == two.dense["head"][:24]).any()
    assert not (one.topk.gaps == two.topk.gaps).all(axis=1).any()


def test_uni_lora_starts_even_and_lora_xs_and_ffa_lora_at_the_base():
    theta = initial_state(replace(LORA, spec=UniLoRASpec(rank=2, theta_length=90, seed=5))).dense["theta"]
    assert 0.018 < np.abs(theta).max() < 0.02
    for spec in (FFALoRASpec(rank=2), LoRAXSSpec(rank=2)):
        ((name, _),) = spec.dense_shapes(LINEARS).items()
        assert not initial_state(replace(LORA, spec=spec)).dense[name].any()


ALL = {spec.kind: replace(LORA, spec=spec(rank=2)) for spec in (FFALoRASpec, LoRAXSSpec)} | {
    "vblora": VBLORA,
    "lora": LORA,
    "uni-lora": replace(LORA, spec=UniLoRASpec(rank=2, theta_length=90)),
    "bank-only": replace(LORA, spec=BankOnlySpec(rank=2, num_vectors=16, vector_length=4)),
}


@pytest.mark.parametrize("blueprint", ALL.values(), ids=ALL)
def test_a_state_is_float32_of_the_declared_shapes(blueprint):
    state = initial_state(blueprint)
    assert {name: array.shape for name, array in state.dense.items()} == blueprint.dense_shapes
    assert all(array.dtype == np.float32 for array in state.dense.values())
    assert (state.topk is None) == (blueprint.topk_shape is None)
    if state.topk is not None:
        assert (*state.topk.positions.shape, 16) == blueprint.topk_shape
        assert (state.topk.positions.dtype, state.topk.gaps.dtype) == (np.int32, np.float32)


# --- Digests -------------------------------------------------------------------------


def test_the_digest_covers_every_number():
    state = initial_state(VBLORA)
    digests = {state.digest, replace(state, version=1).digest}
    for name, array in state.dense.items():
        for at in (0, array.size - 1):
            changed = array.copy()
            changed.flat[at] = np.nextafter(changed.flat[at], np.float32(1))
            digests.add(replace(state, dense={**state.dense, name: changed}).digest)
    for field in ("positions", "gaps"):
        array = getattr(state.topk, field).copy()
        array[-1, -1] += 1
        digests.add(replace(state, topk=replace(state.topk, **{field: array})).digest)
    assert len(digests) == 2 + 4 + 2
    assert all(len(digest) == 16 for digest in digests)


def test_the_digest_does_not_depend_on_layout():
    state = initial_state(VBLORA)
    dense = {name: np.asfortranarray(array) for name, array in reversed(state.dense.items())}
    topk = TopK(np.asfortranarray(state.topk.positions), np.asfortranarray(state.topk.gaps))
    assert State(0, dense, topk).digest == state.digest


def test_golden_digests():
    """Of version 0, that is of everything drawn from the seed."""
    assert initial_state(VBLORA).digest.hex() == "51fce8b4dd5e7400813d6525dc5fa6ac"
    assert initial_state(LORA).digest.hex() == "9dba4417b5326d8c43eaa6f0b7cba633"
    assert initial_state(ALL["uni-lora"]).digest.hex() == "0c8819d88ab00a6fd405b972ad947cc4"
    places = seeded.integers(5, "places", 1000, 90)
    assert hashlib.sha256(places.astype("<i4").tobytes()).hexdigest()[:16] == "bf5d18857bdea30b"


# --- Weights -------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.sampled_from([0.0, 1e-6, 1.0, 30.0, 1e30]), st.integers(0, 1 << 32))
def test_mixture_weights_are_the_softmax(k, scale, seed):
    rng = np.random.default_rng(seed)
    gaps = np.sort(scale * rng.random((4, k - 1)), axis=1).astype(np.float32)
    weights = mixture_weights(gaps)
    assert weights.shape == (4, k)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    logits = -np.concatenate([np.zeros((4, 1)), gaps.astype(np.float64)], axis=1)
    np.testing.assert_allclose(weights, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    assert (np.diff(weights, axis=1) <= 0).all()


# --- Updates -------------------------------------------------------------------------


@pytest.mark.parametrize("blueprint", [VBLORA, LORA], ids=["vblora", "lora"])
def test_a_good_update_passes(blueprint):
    check_update(make_update(blueprint), blueprint, initial_state(blueprint))


def _dense(name: str, change) -> dict:
    dense = dict(make_update(VBLORA).dense)
    dense[name] = change(dense[name].copy())
    return {"dense": dense}


def _topk(field: str, at, value) -> dict:
    topk = make_update(VBLORA).topk
    array = getattr(topk, field).copy()
    array[at] = value
    return {"topk": replace(topk, **{field: array})}


def _put(at, value):
    def change(array):
        array[at] = value
        return array

    return change


BAD = {
    "another version": ({"version": 1}, "trained from version 1"),
    "another state": ({"reference": bytes(16)}, r"trained from version 0 \(00000000\), expected 0"),
    "no examples": ({"examples": 0}, "examples is 0"),
    "fewer than none": ({"examples": -3}, "examples is -3"),
    "too many": ({"examples": 1 << 31}, "examples is 2147483648"),
    "nan": (_dense("bank", _put((3, 1), np.nan)), "bank holds 1 numbers that are not finite"),
    "infinity": (_dense("head", _put(slice(2), -np.inf)), "head holds 2 numbers that are not finite"),
    "shape": (_dense("bank", lambda array: array[:-1]), r"bank has shape \(15, 4\), expected \(16, 4\)"),
    "axes": (_dense("bank", lambda array: array.T), r"bank has shape \(4, 16\)"),
    "flat": (_dense("bank", np.ravel), r"bank has shape \(64,\)"),
    "unknown": (_dense("head", lambda array: array) | {"dense": {"bank": 0, "x": 0}}, "sections are"),
    "missing": ({"dense": {}}, r"sections are \[\], expected \['bank', 'head'\]"),
    "no selection": ({"topk": None}, "the selection is missing"),
    "out of range": (_topk("positions", (4, 0), 16), "positions run from 0 to 16, expected 0 to 15"),
    "below zero": (_topk("positions", (4, 0), -1), "positions run from -1 to 2"),
    "twice": (_topk("positions", (4, 0), 2), "a row names one position twice"),
    "gap nan": (_topk("gaps", (4, 0), np.nan), "gaps are not finite"),
    "gap infinite": (_topk("gaps", (4, 1), np.inf), "gaps are not finite"),
    "gap negative": (_topk("gaps", (4, 0), -1e-6), "gaps are not rising from 0"),
    "gap falling": (_topk("gaps", (4, 0), 9.0), "gaps are not rising from 0"),
    "fewer rows": (
        {"topk": TopK(np.zeros((3, 3), np.int32), np.zeros((3, 2), np.float32))},
        r"selection has shapes \(3, 3\) and \(3, 2\)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_refused_in_words(kind):
    change, fault = BAD[kind]
    with pytest.raises(UpdateError, match=rf"^update: .*{fault}"):
        check_update(replace(make_update(VBLORA), **change), VBLORA, initial_state(VBLORA))


def test_a_selection_where_none_belongs_is_refused():
    update = replace(make_update(LORA), topk=make_update(VBLORA).topk)
    with pytest.raises(UpdateError, match="a selection where none is expected"):
        check_update(update, LORA, initial_state(LORA))


def test_all_faults_come_together():
    change = {"examples": 0, **BAD["nan"][0], **BAD["twice"][0]}
    with pytest.raises(UpdateError, match=r"examples is 0.*; bank holds 1 .*; a row names one"):
        check_update(replace(make_update(VBLORA), **change), VBLORA, initial_state(VBLORA))


def test_same_rows_are_the_same_to_the_bit():
    topk = make_update(VBLORA).topk
    assert topk.same_rows(topk).all()
    gaps, positions = topk.gaps.copy(), topk.positions.copy()
    gaps[2, 1] = np.nextafter(gaps[2, 1], np.float32(9))
    positions[5] = [0, 2, 1]
    same = topk.same_rows(TopK(positions, gaps))
    assert np.flatnonzero(~same).tolist() == [2, 5]
