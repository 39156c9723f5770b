"""The laws of the mean: order, identity, exactness."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server import aggregate as module
from fl_server.aggregate import MAX_EXAMPLES, Mean, aggregate
from tests.fl_server.fakes import make_blueprint, make_update
from vblora import seeded
from vblora.anchors import anchored
from vblora.errors import UpdateError
from vblora.spec import Blueprint, Linear, LoRASpec, VBLoRASpec
from vblora.state import State, TopK, Update, check_update, initial_state, mixture_weights

SHAPES = st.sampled_from([(1, 6), (2, 8), (3, 8), (6, 6), (1, 1), (4, 64)])


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Blueprint, State, list[Update]]:
    """A reference and 1 to 6 updates against it."""
    k, h = draw(SHAPES)
    blueprint = make_blueprint(VBLoRASpec(rank=2, num_vectors=h, vector_length=4, topk=k, seed=3))
    reference = replace(initial_state(blueprint), version=draw(st.integers(0, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    examples = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=6))
    return blueprint, reference, [make_update(reference, rng, h, weight) for weight in examples]


def constant(reference: State, value: float) -> dict[str, np.ndarray]:
    return {name: np.full_like(array, value) for name, array in reference.dense.items()}


def dense_mean(updates: list[Update], h: int) -> np.ndarray:
    """(S, h) mean weights, in float64, the plain way."""
    total = sum(update.examples for update in updates)
    weights = 0.0
    for update in updates:
        assert update.topk is not None
        full = np.zeros((len(update.topk.positions), h))
        np.put_along_axis(full, update.topk.positions, mixture_weights(update.topk.gaps), axis=1)
        weights = weights + full * (update.examples / total)
    return np.asarray(weights)


@settings(deadline=None, max_examples=60)
@given(rounds(), st.randoms(use_true_random=False), st.sampled_from(["weights", "logits"]))
def test_order_of_arrival_does_not_change_a_bit(case, random, space):
    blueprint, reference, updates = case
    expected = aggregate(reference, updates, blueprint, space)
    shuffled = random.sample(updates, len(updates))
    assert aggregate(reference, shuffled, blueprint, space).digest == expected.digest
    assert expected.version == reference.version + 1


@settings(deadline=None, max_examples=60)
@given(rounds())
def test_agrees_with_a_dense_mean(case):
    blueprint, reference, updates = case
    new = aggregate(reference, updates, blueprint)
    check_update(Update(new.version, new.digest, 1, new.dense, new.topk), blueprint, new)
    total = sum(update.examples for update in updates)
    for name, array in reference.dense.items():
        mean = sum(update.dense[name].astype(np.float64) * update.examples for update in updates) / total
        np.testing.assert_allclose(new.dense[name], (array + mean).astype(np.float32), rtol=2e-7, atol=3e-10)

    _, k, h = blueprint.topk_shape
    weights = dense_mean(updates, h)
    chosen = np.take_along_axis(weights, new.topk.positions, axis=1)
    best = -np.sort(-weights, axis=1)[:, :k]
    np.testing.assert_allclose(chosen, best, atol=1e-8)  # the heaviest, in order, up to ties
    np.testing.assert_allclose(
        mixture_weights(new.topk.gaps), best / best.sum(axis=1, keepdims=True), atol=2e-7
    )


def dense_logits_of(topk: TopK, spec: VBLoRASpec) -> np.ndarray:
    """(S, h) logits by place that a selection stands for."""
    seeds = seeded.values(
        spec.seed, np.arange(len(topk.positions)), spec.num_vectors, spec.num_vectors, spec.init_std
    )
    logits = seeds.astype(np.float64)
    np.put_along_axis(logits, topk.positions.astype(np.int64), anchored(spec, seeds, topk), axis=1)
    return logits


@settings(deadline=None, max_examples=60)
@given(rounds())
def test_in_logits_agrees_with_a_dense_mean(case):
    blueprint, reference, updates = case
    new = aggregate(reference, updates, blueprint, "logits")
    check_update(Update(new.version, new.digest, 1, new.dense, new.topk), blueprint, new)
    total = sum(update.examples for update in updates)
    logits = sum(dense_logits_of(update.topk, blueprint.spec) * update.examples for update in updates) / total
    _, k, _ = blueprint.topk_shape
    moved = np.any([~update.topk.same_rows(reference.topk) for update in updates], axis=0)
    chosen = np.take_along_axis(logits, new.topk.positions, axis=1)[moved]
    best = -np.sort(-logits, axis=1)[moved, :k]
    np.testing.assert_allclose(chosen, best, atol=1e-6)
    np.testing.assert_allclose(new.topk.gaps[moved], best[:, :1] - best[:, 1:], atol=1e-6)


@pytest.mark.parametrize("init_std", [0.1, 10.0])
@pytest.mark.parametrize("gap", [50.0, 1e10, 3e38])
def test_no_gap_makes_sums_of_logits_overflow(init_std: float, gap: float):
    """A whole round of clients that claim the largest gap and the most examples, but one."""
    spec = VBLoRASpec(rank=2, num_vectors=8, vector_length=4, topk=2, seed=3, init_std=init_std)
    blueprint = make_blueprint(spec)
    reference = initial_state(blueprint)
    honest = make_update(reference, np.random.default_rng(0), 8, MAX_EXAMPLES)
    rows = len(reference.topk.positions)
    lie = TopK(np.tile(np.array([[6, 7]], np.int32), (rows, 1)), np.full((rows, 1), gap, np.float32))
    liar = replace(honest, dense=constant(reference, 0.0), topk=lie)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = aggregate(reference, [honest, *[liar] * 126], blueprint, "logits")
        assert aggregate(reference, [*[liar] * 126, honest], blueprint, "logits").digest == new.digest
    check_update(Update(new.version, new.digest, 1, new.dense, new.topk), blueprint, new)
    cut = replace(lie, gaps=np.full_like(lie.gaps, 30.0))
    logits = (dense_logits_of(honest.topk, spec) + 126 * dense_logits_of(cut, spec)) / 127
    best = -np.sort(-logits, axis=1)[:, :2]
    np.testing.assert_allclose(np.take_along_axis(logits, new.topk.positions, axis=1), best, atol=1e-4)
    np.testing.assert_allclose(new.topk.gaps, best[:, :1] - best[:, 1:], atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(rounds())
def test_a_convex_combination_stays_within_bounds(case):
    blueprint, reference, updates = case
    new = aggregate(reference, updates, blueprint)
    for name, array in reference.dense.items():
        ends = np.stack([array + update.dense[name] for update in updates])
        assert (new.dense[name] <= ends.max(axis=0) + 1e-8).all()
        assert (new.dense[name] >= ends.min(axis=0) - 1e-8).all()
    weights = mixture_weights(new.topk.gaps)
    assert (weights > 0).all()
    assert (weights <= 1).all()
    assert (np.diff(weights, axis=1) <= 0).all()


@settings(deadline=None, max_examples=40)
@given(rounds(), st.sampled_from(["weights", "logits"]))
def test_zero_updates_are_identity(case, space):
    blueprint, reference, updates = case
    zeros = constant(reference, 0.0)
    reference.dense["bank"][0] = -0.0  # equal to 0, but not the same bits
    reference = replace(reference)  # its digest is cached
    same = [replace(update, dense=zeros, topk=reference.topk) for update in updates]
    new = aggregate(reference, same, blueprint, space)
    assert replace(new, version=reference.version).digest == reference.digest


@settings(deadline=None, max_examples=40)
@given(rounds())
def test_rows_that_nobody_changed_stay_exact(case):
    blueprint, reference, updates = case
    new = aggregate(reference, updates, blueprint)
    unchanged = np.logical_and.reduce([update.topk.same_rows(reference.topk) for update in updates])
    assert new.topk.same_rows(reference.topk)[unchanged].all()


@pytest.mark.parametrize("order", [1, -1])
def test_sums_outgrow_an_int64_without_a_trace(order: int):
    """Two limbs or one, the mean is that of exact integers."""
    blueprint = make_blueprint()
    reference = initial_state(blueprint)
    sizes = [100.0, -100.0, 100.0, 0.5, 100.0, 100.0][::order]
    updates = [
        Update(0, reference.digest, MAX_EXAMPLES, constant(reference, size), reference.topk) for size in sizes
    ]
    mean = Mean(reference, blueprint)
    for update in updates:
        mean.add(update)
    new = mean.finish()
    expected = (reference.dense["bank"].astype(np.float64) + 300.5 / 6).astype(np.float32)
    np.testing.assert_array_equal(new.dense["bank"], expected)


@settings(deadline=None, max_examples=20)
@given(rounds(), st.randoms(use_true_random=False))
def test_carrying_early_or_late_gives_the_same_bits(case, random):
    blueprint, reference, updates = case
    mean = Mean(reference, blueprint)
    for update in updates:
        mean.add(update)
        if random.random() < 0.5:
            for total in mean._sums.values():
                total._carry()
    assert mean.finish().digest == aggregate(reference, updates, blueprint).digest


def test_merging_often_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    blueprint = make_blueprint()
    reference = initial_state(blueprint)
    rng = np.random.default_rng(0)
    updates = [make_update(reference, rng, 8, 5 + n) for n in range(20)]
    expected = aggregate(reference, updates, blueprint)
    monkeypatch.setattr(module, "MERGE", 7)
    monkeypatch.setattr(module, "CHUNK", 5)
    assert aggregate(reference, updates, blueprint).digest == expected.digest


def test_ties_go_to_the_lower_position():
    blueprint = make_blueprint()
    reference = initial_state(blueprint)
    rows = blueprint.rows
    zeros = constant(reference, 0.0)
    gaps = np.zeros((rows, 1), np.float32)
    updates = [
        Update(0, reference.digest, 3, zeros, TopK(np.tile(np.array(pair, np.int32), (rows, 1)), gaps))
        for pair in ([7, 4], [5, 6])
    ]
    topk = aggregate(reference, updates, blueprint).topk
    np.testing.assert_array_equal(topk.positions, np.tile([4, 5], (rows, 1)))
    np.testing.assert_array_equal(topk.gaps, 0)


def test_huge_gaps_stay_finite():
    blueprint = make_blueprint()
    reference = initial_state(blueprint)
    zeros = constant(reference, 0.0)
    topk = TopK(reference.topk.positions, np.full_like(reference.topk.gaps, 1e4))
    new = aggregate(reference, [Update(0, reference.digest, 3, zeros, topk)], blueprint)
    np.testing.assert_allclose(new.topk.gaps, 32 * np.log(2), rtol=1e-6)


def test_free_rows_are_averaged_too():
    blueprint = Blueprint(LoRASpec(rank=2), (Linear("a", 8, 12),))
    reference = initial_state(blueprint)
    rng = np.random.default_rng(0)
    updates = [make_update(reference, rng, 0, weight) for weight in (1, 2, 3)]
    new = aggregate(reference, updates, blueprint)
    mean = sum(update.dense["rows"].astype(np.float64) * update.examples for update in updates) / 6
    np.testing.assert_allclose(new.dense["rows"], reference.dense["rows"] + mean, atol=1e-8)
    assert new.topk is None


def test_what_the_sums_cannot_hold_is_refused_whole():
    blueprint = make_blueprint()
    reference = initial_state(blueprint)
    rng = np.random.default_rng(0)
    good = make_update(reference, rng, 8, 4)
    head = np.full_like(good.dense["head"], 1e6)
    bad = replace(good, dense={**good.dense, "head": head}, examples=10_000)
    mean = Mean(reference, blueprint)
    mean.add(good)
    with pytest.raises(UpdateError, match=r"section head changes by up to 1e\+06 over 10000 examples"):
        mean.add(bad)
    with pytest.raises(UpdateError, match="expected 1 to 16777216"):
        mean.add(replace(good, examples=MAX_EXAMPLES + 1))
    assert mean.finish().digest == aggregate(reference, [good], blueprint).digest


def test_too_many_examples_in_a_round(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_TOTAL_EXAMPLES", 10)
    blueprint = make_blueprint()
    reference = initial_state(blueprint)
    mean = Mean(reference, blueprint)
    mean.add(make_update(reference, np.random.default_rng(0), 8, 6))
    with pytest.raises(UpdateError, match="make 12 this round, expected at most 10"):
        mean.add(make_update(reference, np.random.default_rng(1), 8, 6))


def test_no_update_is_an_error():
    blueprint = make_blueprint()
    with pytest.raises(UpdateError, match="no update"):
        aggregate(initial_state(blueprint), [], blueprint)
