"""Rows from tensors: against the formula, for one client and for many, forward and gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vblora.dense import seeded_table, start_logits
from tests.vblora.tiny import LORA, VBLORA, make_state
from vblora.errors import ModelError
from vblora.rows import MixedRows, mix
from vblora.spec import Blueprint, HeadTensor, Linear, LoRASpec, VBLoRASpec
from vblora.state import State, initial_state

CPU = torch.device("cpu")
LINEARS = (Linear("a", 16, 32), Linear("b", 32, 40))
HEAD = (HeadTensor("head.weight", (2, 16)),)


def blueprint(spec: VBLoRASpec | LoRASpec) -> Blueprint:
    return Blueprint(spec, LINEARS, HEAD, "toy", ("x", "y"))


def formula(bank: Tensor, logits: Tensor, k: int) -> Tensor:
    """Rows of one client as the paper writes them (eq. 3-5); logits (S, h) in the bank's order."""
    best, vectors = logits.topk(k, dim=-1)
    return (best.softmax(dim=-1).unsqueeze(-1) * bank[vectors]).sum(dim=-2)


def dense_logits(spec: VBLoRASpec, state: State) -> Tensor:
    order, seeds = seeded_table(spec, len(state.topk.positions))
    return torch.empty_like(seeds).scatter(1, order.long(), start_logits(spec, seeds, state.topk))


# --- mix -----------------------------------------------------------------------------


def make_mix(
    clients: int = 2, h: int = 5, rows: int = 4, k: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(clients, h, 3, generator=generator, dtype=torch.float64)
    logits = torch.randn(clients, rows * h, generator=generator, dtype=torch.float64)
    order = torch.cat([torch.randperm(h, generator=generator) for _ in range(rows)]).to(torch.int16)
    slots = logits.view(clients, rows, h).topk(k).indices + torch.arange(0, rows * h, h).view(1, -1, 1)
    return bank.requires_grad_(), logits.requires_grad_(), slots, order


def test_mix_is_the_formula_and_its_gradient():
    bank, logits, slots, order = make_mix()
    expected = []
    for client in range(2):
        by_vector = torch.stack(
            [logits[client].view(4, 5)[row][order.view(4, 5)[row].long().argsort()] for row in range(4)]
        )
        expected.append(formula(bank[client], by_vector, 3))
    found = mix(bank, logits, slots, order)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-14, atol=1e-14)

    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(found, (bank, logits), seed)
    theirs = torch.autograd.grad(torch.stack(expected), (bank, logits), seed)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_mix_passes_gradcheck():
    bank, logits, slots, order = make_mix()
    assert torch.autograd.gradcheck(lambda b, z: mix(b, z, slots, order), (bank, logits))


def test_only_chosen_logits_get_gradients_and_those_of_a_row_cancel():
    bank, logits, slots, order = make_mix()
    gradient = torch.autograd.grad(mix(bank, logits, slots, order).square().sum(), logits)[0]
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, slots.flatten(1), True)
    assert (gradient[~chosen] == 0).all()
    assert (gradient[chosen] != 0).all()
    assert gradient.view(2, 4, 5).sum(dim=-1).abs().max() < 1e-15


def test_a_single_choice_has_weight_one_and_no_gradient():
    bank, logits, slots, order = make_mix(k=1)
    rows = mix(bank, logits, slots, order)
    assert torch.equal(rows[0], bank[0][order[slots[0, :, 0]].long()])
    assert (torch.autograd.grad(rows.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_dtype_of_the_bank(dtype):
    bank, logits, slots, order = make_mix()
    rows = mix(bank.to(dtype), logits.float(), slots, order)
    assert rows.dtype is dtype
    torch.testing.assert_close(rows.double(), mix(bank, logits, slots, order), rtol=0.03, atol=0.03)


# --- sources -------------------------------------------------------------------------


@pytest.mark.parametrize("h", [2, 40, 300])
def test_mixed_rows_are_the_formula(h):
    spec = replace(VBLORA, num_vectors=h)
    state = make_state(blueprint(spec))
    source = MixedRows(blueprint(spec), CPU)
    rows = source.rows(source.load(*[state] * 3))
    expected = formula(torch.from_numpy(state.dense["bank"]), dense_logits(spec, state), spec.topk)
    for one in rows:
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-7)


def test_clients_do_not_touch_each_other():
    spec = replace(VBLORA, num_vectors=300)
    state = make_state(blueprint(spec))
    source = MixedRows(blueprint(spec), CPU)
    tensors = source.load(*[state] * 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    weights = torch.randn((3, blueprint(spec).rows, 16), generator=generator)
    together = source.rows(tensors)
    gradients = torch.autograd.grad((together * weights).sum(), list(tensors.values()))
    for client in range(3):
        alone = {
            name: tensor[client : client + 1].detach().requires_grad_() for name, tensor in tensors.items()
        }
        rows = source.rows(alone)
        torch.testing.assert_close(rows[0], together[client])
        found = torch.autograd.grad((rows[0] * weights[client]).sum(), list(alone.values()))
        for one, all_of_them in zip(found, gradients, strict=True):
            torch.testing.assert_close(one[0], all_of_them[client])


def test_growth_changes_no_row():
    spec = replace(VBLORA, num_vectors=300)
    source = MixedRows(blueprint(spec), CPU, width=1)
    tensors = source.load(*[initial_state(blueprint(spec))] * 2)
    with torch.no_grad():
        tensors["logits"][1, source._candidates.width - 1] = 9.0  # the last place that row 0 holds
    before = source.rows(tensors)
    assert source.growth() == {}, "the answer is read when the question is asked again"
    grown = source.growth()["logits"]
    assert len(grown) == 3 * source._candidates.width
    wider = {**tensors, "logits": torch.cat([tensors["logits"].detach(), grown.expand(2, -1)], dim=1)}
    assert torch.equal(source.rows(wider), before)
    assert source.growth() == {}


@pytest.mark.parametrize("k", [1, 2, 5])
def test_what_was_not_trained_is_the_reference_to_the_bit(k):
    """Gaps taken back from logits are rounded; the server would mix in rows that nobody changed."""
    spec = replace(VBLORA, num_vectors=300, topk=k)
    state = make_state(blueprint(spec))
    source = MixedRows(blueprint(spec), CPU)
    tensors = source.load(*[state] * 2)
    for found in source.selections(tensors):
        assert replace(state, topk=found).digest == state.digest
    if k == 1:
        return
    with torch.no_grad():
        tensors["logits"][1] *= 1.0 + 1e-3  # client 1 moves, client 0 does not
    still, moved = source.selections(tensors)
    assert still.same_rows(state.topk).all()
    assert not moved.same_rows(state.topk).any()
    np.testing.assert_allclose(moved.gaps, state.topk.gaps * (1 + 1e-3), rtol=1e-4, atol=1e-6)


def test_selections_read_what_the_logits_say():
    spec = replace(VBLORA, num_vectors=30, topk=3)
    source = MixedRows(blueprint(spec), CPU)
    tensors = source.load(initial_state(blueprint(spec)))
    with torch.no_grad():
        tensors["logits"].view(-1, 30)[4, [17, 2, 9]] = torch.tensor([5.0, 4.5, 3.0])
    (topk,) = source.selections(tensors)
    assert topk.positions[4].tolist() == [17, 2, 9]
    assert topk.gaps[4].tolist() == [0.5, 2.0]
    assert topk.positions.dtype == np.int32
    assert topk.gaps.dtype == np.float32


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_state_made_of_a_selection_has_the_rows_that_were_trained(k):
    """The levels of logits stay behind, the mixtures do not."""
    spec = replace(VBLORA, num_vectors=300, topk=k)
    source = MixedRows(blueprint(spec), CPU)
    tensors = source.load(make_state(blueprint(spec)))
    with torch.no_grad():
        tensors["logits"] += torch.randn(tensors["logits"].shape, generator=torch.Generator().manual_seed(0))
    rows = source.rows(tensors).detach()
    (topk,) = source.selections(tensors)
    bank = {"bank": tensors["bank"][0].detach().numpy()}
    again = source.rows(source.load(State(1, bank, topk)))
    torch.testing.assert_close(again, rows, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_selects_grows_and_mixes_as_a_cpu_does():
    spec = replace(VBLORA, num_vectors=300)
    found = {}
    for device in ("cpu", "cuda"):
        source = MixedRows(blueprint(spec), torch.device(device), width=1)
        tensors = source.load(*[initial_state(blueprint(spec))] * 2)
        with torch.no_grad():
            tensors["logits"][1, source._candidates.width - 1] = 9.0
        source.rows(tensors)
        assert source.growth() == {}
        grown = source.growth()["logits"].expand(2, -1)
        tensors["logits"] = torch.cat([tensors["logits"].detach(), grown], dim=1).requires_grad_()
        rows = source.rows(tensors)
        gradients = torch.autograd.grad(rows.square().sum(), list(tensors.values()))
        numbers = [part.detach().cpu() for part in (rows, *gradients, source._candidates.order)]
        found[device] = numbers, source.selections(tensors)
    for one, other in zip(found["cpu"][0], found["cuda"][0], strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(found["cpu"][1], found["cuda"][1], strict=True):
        assert one.same_rows(other).all()


def test_loaded_tensors_share_nothing():
    state = make_state(blueprint(VBLORA))
    kept = state.dense["bank"].copy()
    tensors = MixedRows(blueprint(VBLORA), CPU).load(*[state] * 2)
    with torch.no_grad():
        tensors["bank"][0] += 1
    assert (tensors["bank"][1].detach().numpy() == kept).all()
    assert (state.dense["bank"] == kept).all()
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in tensors.values())


def test_a_source_refuses_what_it_cannot_mix():
    with pytest.raises(ModelError, match="lora has no bank"):
        MixedRows(blueprint(LORA), CPU)
    with pytest.raises(ModelError, match="lacks its selection"):
        MixedRows(blueprint(VBLORA), CPU).load(replace(make_state(blueprint(VBLORA)), topk=None))
