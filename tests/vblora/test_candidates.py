"""Compacted logits are exact: they train, tie and grow as all h logits would."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fl_client.optim import AdamW
from tests.vblora.dense import DenseRows, largest, seeded_table, start_logits, unfold
from tests.vblora.tiny import adapt, make_base, make_blueprint, make_inputs
from vblora.anchors import anchored
from vblora.candidates import CHECK_EVERY, WIDTH, Candidates, _largest
from vblora.model import AdaptedModel
from vblora.rows import MixedRows
from vblora.seeded import values
from vblora.spec import VBLoRASpec
from vblora.state import State, TopK, initial_state

CPU = torch.device("cpu")
RATES = {"bank": 4e-3, "logits": 0.05, "head": 4e-3}  # logits fast enough for many rows to outgrow the width


# --- Training ------------------------------------------------------------------------


def train_compacted(model: AdaptedModel, state: State, steps: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """As `fl_client.train` does it, in float64."""
    tensors = _doubled(model.load(state))
    optimiser = AdamW(RATES)
    places = []
    for step in range(steps):
        if step % CHECK_EVERY == 0:
            for name, grown in model.source.growth().items():
                wider = torch.cat([tensors[name].detach(), grown.double().expand(1, -1)], dim=-1)
                tensors[name] = wider.requires_grad_()
                optimiser.widen(name, len(grown))
        places.append(model.source._candidates.select(tensors["logits"]).places)
        optimiser.step(tensors, _gradients(model, tensors, step), None)
    return tensors, places


def train_dense(model: AdaptedModel, state: State, steps: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """All logits, torch's own optimiser."""
    source = DenseRows(model.blueprint)
    model.source = source
    tensors = _doubled(model.load(state))
    groups = [{"params": [tensor], "lr": RATES[name]} for name, tensor in tensors.items()]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, foreach=False)
    for step in range(steps):
        for name, gradient in _gradients(model, tensors, step).items():
            tensors[name].grad = gradient
        optimiser.step()
    return tensors, source.places


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def _gradients(model: AdaptedModel, tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    inputs = make_inputs(2, length=6, seed=step % 10)
    model.bind(tensors)
    logits = model(**inputs).logits.flatten(0, -2)
    targets = torch.arange(len(logits)) % logits.shape[-1]
    found = torch.autograd.grad(functional.cross_entropy(logits, targets), list(tensors.values()))
    model.unbind()
    return dict(zip(tensors, found, strict=True))


def check_training(base: nn.Module, spec: VBLoRASpec, targets: str = "all-linear", steps: int = 300) -> None:
    """Same sets at every step, same weights at the end, from a state that was trained before."""
    blueprint = make_blueprint(base, spec, targets)
    state = initial_state(blueprint)
    assert state.topk is not None
    positions = np.random.default_rng(1).permuted(np.tile(np.arange(5), (blueprint.rows, 1)), axis=1)
    gaps = np.random.default_rng(2).exponential(0.1, state.topk.gaps.shape).astype(np.float32)
    state = replace(state, topk=TopK(positions[:, : spec.topk].astype(np.int32), np.sort(gaps, axis=1)))

    compact = adapt(base, spec, targets)
    compact.source = MixedRows(blueprint, CPU, width=1)
    found, found_places = train_compacted(compact, state, steps)
    dense = adapt(base, spec, targets)
    expected, expected_places = train_dense(dense, state, steps)

    for step, (ours, theirs) in enumerate(zip(found_places, expected_places, strict=True)):
        assert (ours == theirs).all(), f"step {step}"
    candidates, reference = compact.source._candidates, dense.source
    assert candidates._tiers, "no row outgrew the width: the test shows nothing"
    assert found["logits"].shape[1] < expected["logits"].shape[1] or spec.num_vectors == 64
    grown = unfold(candidates, found["logits"][0], reference.seeds)
    assert torch.equal(grown, expected["logits"].view_as(grown))
    for name in found.keys() - {"logits"}:
        assert torch.equal(found[name], expected[name]), name


CASES = [(h, std) for h in (64, 256, 2048) for std in (0.01, 0.1)]


@pytest.mark.parametrize(("h", "std"), CASES)
def test_training_equals_dense_training(h, std):
    spec = VBLoRASpec(rank=2, num_vectors=h, vector_length=16, topk=2, init_std=std, seed=3)
    check_training(make_base("bert", layers=1).double(), spec, "query,value,output.dense")


@pytest.fixture(scope="module")
def stories(assets: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(assets / "models" / "stories260K-hf", dtype=torch.float64)


def test_training_equals_dense_training_on_a_real_model(stories):
    spec = VBLoRASpec(rank=2, num_vectors=256, vector_length=32, topk=2, init_std=0.1)
    check_training(stories, spec, "q_proj,v_proj", steps=100)


@pytest.mark.slow
@pytest.mark.parametrize(("h", "std"), CASES)
@pytest.mark.parametrize("k", [2, 3])
def test_training_equals_dense_training_on_all_of_a_real_model(stories, h, std, k):
    check_training(stories, VBLoRASpec(2, h, 64, k, std))


# --- Starting from a selection -------------------------------------------------------


@st.composite
def selections(draw: st.DrawFn) -> tuple[VBLoRASpec, TopK]:
    """Any selection that `check_update` lets pass, of a few rows."""
    h = draw(st.sampled_from([1, 2, 3, 7, 64, 65, 300, 2048]))
    k = draw(st.one_of(st.integers(1, min(h, 5)), st.just(min(h, 64))))
    rows, rng = draw(st.integers(1, 5)), np.random.default_rng(draw(st.integers(0, 1 << 32)))
    reach = draw(st.sampled_from([k, min(h, 2 * k), h]))
    positions = np.argsort(rng.random((rows, reach)), axis=1)[:, :k].astype(np.int32)
    scale = draw(st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e6]))
    gaps = np.sort(scale * rng.exponential(size=(rows, k - 1)), axis=1).astype(np.float32)
    std, seed = draw(st.sampled_from([0.01, 0.1, 1.0])), draw(st.integers(0, 1 << 40))
    return VBLoRASpec(num_vectors=h, topk=k, init_std=std, seed=seed), TopK(positions, gaps)


@settings(deadline=None, max_examples=150)
@given(selections())
def test_a_start_selects_what_it_stands_for(case):
    spec, topk = case
    rows = len(topk.positions)
    candidates = Candidates(spec, rows, CPU)
    (logits,) = candidates.start(topk)
    selection = candidates.select(logits.unsqueeze(0))
    assert (selection.places[0].numpy() == topk.positions).all()
    assert (candidates.order[selection.slots[0]] == seeded_table(spec, rows)[0].gather(1, _long(topk))).all()

    chosen = logits[selection.slots[0]].numpy()
    gaps = chosen[:, :1] - chosen[:, 1:]
    ulps = np.spacing(np.abs(chosen).max(axis=1, keepdims=True)) * (spec.topk + 2)
    assert (np.abs(gaps - topk.gaps) <= ulps).all()


@settings(deadline=None, max_examples=60)
@given(selections())
def test_a_start_keeps_all_other_seeds_and_its_distance_from_them(case):
    spec, topk = case
    rows = len(topk.positions)
    candidates = Candidates(spec, rows, CPU)
    _, seeds = seeded_table(spec, rows)
    logits = unfold(candidates, candidates.start(topk)[0], seeds)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, _long(topk), True)
    assert torch.equal(logits[~chosen], seeds[~chosen])
    lowest = logits.masked_fill(~chosen, torch.inf).amin(dim=1)
    best_other = logits.masked_fill(chosen, -torch.inf).amax(dim=1)
    assert (lowest - best_other >= spec.margin * 0.999).all()


@settings(deadline=None, max_examples=60)
@given(selections())
def test_anchoring_needs_the_first_k_plus_one_seeds_only(case):
    spec, topk = case
    rows, h = np.arange(len(topk.positions)), spec.num_vectors
    whole = anchored(spec, values(spec.seed, rows, h, h, spec.init_std), topk)
    few = anchored(spec, values(spec.seed, rows, h, min(h, spec.topk + 1), spec.init_std), topk)
    assert (whole == few).all()
    assert whole.dtype == np.float32


def test_a_start_leaves_nothing_of_the_last_one():
    spec = VBLoRASpec(num_vectors=500, topk=2)
    deep = TopK(np.array([[3, 400], [0, 1], [77, 5]], np.int32), np.full((3, 1), 0.5, np.float32))
    near = TopK(np.array([[0, 1], [1, 0], [2, 3]], np.int32), np.full((3, 1), 0.5, np.float32))
    candidates = Candidates(spec, 3, CPU)
    assert candidates.start(deep).shape[1] > 3 * WIDTH
    again = candidates.start(near)
    fresh = Candidates(spec, 3, CPU)
    assert torch.equal(again, fresh.start(near))
    assert torch.equal(candidates.order, fresh.order)
    assert torch.equal(candidates.reach, fresh.reach)


@settings(deadline=None, max_examples=60)
@given(selections(), st.integers(2, 4), st.integers(0, 1 << 32))
def test_clients_that_start_apart_have_what_each_has_alone(case, clients, draw):
    spec, first = case
    rows, k = first.positions.shape
    rng = np.random.default_rng(draw)
    starts = [first]
    for _ in range(clients - 1):
        reach = rng.integers(k, spec.num_vectors, endpoint=True)
        positions = np.argsort(rng.random((rows, reach)), axis=1)[:, :k].astype(np.int32)
        starts.append(TopK(positions, np.sort(rng.random((rows, k - 1)), axis=1).astype(np.float32)))
    _, seeds = seeded_table(spec, rows)
    together, alone = Candidates(spec, rows, CPU), Candidates(spec, rows, CPU)
    logits = together.start(*starts)
    places = together.select(logits).places
    reach = together.reach
    for client, topk in enumerate(starts):
        expected = unfold(alone, alone.start(topk)[0], seeds)
        assert torch.equal(unfold(together, logits[client], seeds), expected)
        assert torch.equal(places[client], _long(topk))
        assert (reach >= alone.reach).all()
    assert torch.equal(reach, places.amax(dim=(0, 2)) + 1), "that of the client who reaches furthest"


def test_logits_of_another_start_are_refused():
    spec = VBLoRASpec(num_vectors=500, topk=2)
    candidates = Candidates(spec, 1, CPU)
    near = candidates.start(TopK(np.array([[0, 1]], np.int32), np.ones((1, 1), np.float32)))
    candidates.start(TopK(np.array([[0, 400]], np.int32), np.ones((1, 1), np.float32)))
    with pytest.raises(ValueError, match="64 slots, expected 500"):
        candidates.select(near)


# --- Selecting and growing -----------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1 << 32), st.integers(1, 30), st.integers(1, 30), st.integers(1, 4))
def test_the_largest_come_in_order_and_ties_to_the_lower_place(seed, width, k, distinct):
    k = min(k, width)
    drawn = torch.from_numpy(np.random.default_rng(seed).integers(0, distinct, (2, 3, width))).float()
    assert torch.equal(_largest(drawn, k), largest(drawn, k))


def test_a_row_with_a_nan_names_one_place_twice_and_does_not_grow():
    """Grown to h, the rows of a diverged client would not fit into memory; the server refuses it anyway."""
    spec = VBLoRASpec(num_vectors=500, topk=2)
    candidates = Candidates(spec, 3, CPU)
    logits = candidates.start(*[TopK(np.array([[0, 1]] * 3, np.int32), np.ones((3, 1), np.float32))] * 2)
    logits[1] = torch.nan  # a whole client
    logits[0, WIDTH + 5] = torch.nan  # one logit of another
    places = candidates.select(logits).places
    assert places.tolist() == [[[0, 1], [0, 0], [0, 1]], [[0, 0]] * 3]
    assert candidates.grow() == []


@pytest.mark.parametrize(
    ("h", "k", "clients", "width"),
    [
        *((130, 2, 1, width) for width in range(20, 37)),  # each distance of the end from a check
        (300, 2, 3, 1),
        (1000, 5, 2, 1),
        (90, 1, 2, 1),
        (41, 4, 1, 1),
    ],
)
def test_growth_keeps_up_with_the_fastest_that_rows_can_reach(h, k, clients, width):
    """Every chosen logit falls out at once, so each step touches k new places: all that the slack is for."""
    rows, rng = 4, np.random.default_rng(0)
    spec = VBLoRASpec(num_vectors=h, topk=k, init_std=0.1)
    positions = np.stack([rng.permutation(3 * k)[:k] for _ in range(rows)]).astype(np.int32)
    topk = TopK(positions, np.sort(rng.random((rows, k - 1)), axis=1).astype(np.float32))
    _, seeds = seeded_table(spec, rows)
    candidates = Candidates(spec, rows, CPU, width)
    compact = candidates.start(*[topk] * clients)
    dense = start_logits(spec, seeds, topk).repeat(clients, 1, 1)
    steps = h // k + 5
    for step in range(steps):
        if step % CHECK_EVERY == 0 and (grown := candidates.grow()):
            compact = torch.cat([compact, torch.cat(grown).expand(clients, -1)], dim=1)
        selection = candidates.select(compact)
        assert torch.equal(selection.places, largest(dense, k)), step
        kicks = torch.from_numpy(rng.normal(-5, 2, selection.places.shape).astype(np.float32))
        if clients > 1:
            kicks[1:] *= torch.from_numpy(rng.random((clients - 1, rows, k)) < 0.5)  # the others lag behind
        compact.scatter_add_(1, selection.slots.flatten(1), kicks.flatten(1))
        dense.scatter_add_(2, selection.places, kicks)
        reach = candidates.reach.view(1, -1, 1)
        places = torch.arange(h).view(1, 1, -1)
        assert ((dense == seeds) | (places < reach)).all()
    assert torch.equal(unfold(candidates, compact[0], seeds), dense[0])


def test_memory_at_rest_of_the_largest_shape():
    """Llama-2-13B, rank 6: 130 MB, where dense logits take 3 GB; 4% of rows have outgrown the width."""
    rows = 91_680
    spec = VBLoRASpec(rank=6, num_vectors=2048, topk=2)
    positions = np.tile(np.array([0, 1], np.int32), (rows, 1))
    positions[::25, 1] = 150
    candidates = Candidates(spec, rows, CPU)
    assert candidates.width == WIDTH == 64
    logits = candidates.start(TopK(positions, np.ones((rows, 1), np.float32)))
    moments = 2 * logits.nbytes
    assert _held_bytes(candidates) + logits.nbytes + moments <= 130e6


def _held_bytes(owner: object) -> int:
    """Of all arrays and tensors that an object holds, inside its own objects too; shared storage once."""
    sizes, waiting, seen = {}, [owner], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            sizes[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, np.ndarray):
            sizes[id(item)] = item.nbytes
        elif not isinstance(item, type):
            waiting += gc.get_referents(item)
    return sum(sizes.values())


def _long(topk: TopK) -> Tensor:
    return torch.from_numpy(topk.positions.astype(np.int64))
