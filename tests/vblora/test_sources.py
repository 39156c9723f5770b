"""Rows that dense tensors alone make. What they add to a model is checked in test_model.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.vblora.tiny import KINDS, make_state
from vblora import seeded
from vblora.rows import MixedRows
from vblora.sources import DenseRows, row_source, singular_factors
from vblora.spec import Blueprint, Linear
from vblora.state import initial_state, lora_rows

CPU = torch.device("cpu")
LINEARS = (Linear("a", 16, 32), Linear("b", 32, 48))
DENSE = [kind for kind in KINDS if kind != "vblora"]


def weight(name: str) -> torch.Tensor:
    """(out, in)"""
    linear = {linear.name: linear for linear in LINEARS}[name]
    generator = torch.Generator().manual_seed(len(name) + linear.in_features)
    return torch.randn(linear.out_features, linear.in_features, generator=generator)


def make_source(kind: str) -> tuple[Blueprint, DenseRows]:
    blueprint = Blueprint(KINDS[kind], LINEARS)
    source = row_source(blueprint, CPU, weight)
    assert isinstance(source, DenseRows)
    return blueprint, source


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_source_loads_its_sections_and_chooses_nothing(kind):
    blueprint, source = make_source(kind)
    state = make_state(blueprint)
    tensors = source.load(*[state] * 2)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: (2, *shape) for name, shape in blueprint.dense_shapes.items()
    }
    assert all((tensors[name][1].detach().numpy() == state.dense[name]).all() for name in tensors)
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in tensors.values())
    assert source.rows(tensors).shape == (2, blueprint.rows, blueprint.vector_length)
    assert source.growth() == {}
    assert source.selections(tensors) == [None, None]


@pytest.mark.parametrize("kind", DENSE)
def test_gradients_are_those_of_differences(kind):
    _, source = make_source(kind)
    blueprint = Blueprint(KINDS[kind], LINEARS)
    tensors = source.load(*[make_state(blueprint)] * 2)
    (name,) = tensors
    values = tensors[name].detach().double()
    weights = torch.randn((2, blueprint.rows, blueprint.vector_length), dtype=torch.float64)

    def loss(given: torch.Tensor) -> torch.Tensor:
        return (source.rows({name: given}).square() * weights).sum()

    (gradient,) = torch.autograd.grad(loss(leaf := values.clone().requires_grad_()), leaf)
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (loss(values + 1e-5 * direction) - loss(values - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_vblora_has_a_source_of_its_own():
    assert isinstance(row_source(Blueprint(KINDS["vblora"], LINEARS), CPU, weight), MixedRows)


def test_a_stays_where_the_seed_put_it():
    blueprint, source = make_source("ffa-lora")
    lora = Blueprint(KINDS["lora"], LINEARS)
    start = initial_state(lora).dense["rows"]
    assert (lora_rows(blueprint) == start).all()
    rows = source.rows(source.load(make_state(blueprint)))[0].detach().numpy()
    for part in blueprint.slices:
        assert (rows[part.start : part.middle] == start[part.start : part.middle]).all()
        assert (rows[part.middle : part.stop] != 0).all()


def test_bank_only_is_vblora_at_its_start():
    bank_only, source = make_source("bank-only")
    vblora = Blueprint(KINDS["vblora"], LINEARS)
    state = initial_state(vblora)
    assert (initial_state(bank_only).dense["bank"] == state.dense["bank"]).all()
    theirs = MixedRows(vblora, CPU)
    expected = theirs.rows(theirs.load(state))
    torch.testing.assert_close(source.rows(source.load(initial_state(bank_only))), expected)


def test_the_map_of_uni_lora_keeps_lengths():
    blueprint, source = make_source("uni-lora")
    tensors = source.load(*[make_state(blueprint)] * 3)
    rows = source.rows(tensors)
    assert np.unique(seeded.integers(7, "places", 384, 40)).size == 40  # every place is read
    torch.testing.assert_close(rows.flatten(1).norm(dim=1), tensors["theta"].norm(dim=1))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (300, 200)])
def test_singular_factors_are_those_of_an_exact_svd(shape):
    """The last shape is wider than what is carried: its spectrum falls, as those of trained weights do."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    matrix = left @ (s * torch.arange(1, len(s) + 1) ** -0.5).diag() @ right
    a, b = singular_factors(matrix.float(), 5)
    assert a.dtype is b.dtype is torch.float32
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose((b.T @ a).numpy(), (u[:, :5] @ s[:5].diag() @ vh[:5]).numpy(), atol=1e-4)
    np.testing.assert_allclose(b @ b.T, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(a.norm(dim=1), s[:5], rtol=1e-5)


def test_signs_do_not_depend_on_who_computes():
    """A row and a column order of its own, in another precision: the same factors, rearranged."""
    matrix = weight("b")
    a, b = singular_factors(matrix, 4)
    again = singular_factors(matrix.double() * (1 + 1e-12), 4)
    torch.testing.assert_close(again, (a, b), rtol=1e-5, atol=1e-6)
    shuffled = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(0))
    other_a, other_b = singular_factors(matrix[shuffled], 4)
    torch.testing.assert_close(other_a, a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_b, b[:, shuffled], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DENSE)
def test_a_gpu_composes_as_a_cpu_does(kind):
    blueprint = Blueprint(KINDS[kind], LINEARS)
    found = []
    for device in (CPU, torch.device("cuda")):
        source = row_source(blueprint, device, lambda name, device=device: weight(name).to(device))
        tensors = source.load(make_state(blueprint), make_state(blueprint, seed=1))
        rows = source.rows(tensors)
        gradients = torch.autograd.grad(rows.square().sum(), list(tensors.values()))
        found.append([part.detach().cpu() for part in (rows, *gradients)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
