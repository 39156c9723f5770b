"""The two layers alone: the low-rank path, the head, one client and many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora.layers import AdaptedLinear, HeadLinear

torch.manual_seed(0)
A, B = torch.randn(3, 2, 6), torch.randn(3, 2, 5)  # C, r, in and C, r, out
WEIGHT, BIAS = torch.randn(3, 5, 6), torch.randn(3, 5)
INPUTS = {"pooled": torch.randn(6, 6), "tokens": torch.randn(6, 4, 6)}


def bases() -> dict[str, nn.Module]:
    return {"linear": nn.Linear(6, 5), "no bias": nn.Linear(6, 5, bias=False), "conv1d": Conv1D(5, 6)}


@pytest.mark.parametrize("kind", bases())
@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("scaling", [1.0, 0.25])
@pytest.mark.parametrize("frozen", [True, False])
def test_each_client_meets_its_own_factors(kind, shape, scaling, frozen):
    base, x = bases()[kind].requires_grad_(not frozen), INPUTS[shape]
    layer = AdaptedLinear(base, scaling)
    layer.factors = (A, B)
    parts = [base(part) + scaling * (part @ a.T) @ b for part, a, b in zip(x.chunk(3), A, B, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(parts), rtol=1e-5, atol=1e-5)
    for client, part in enumerate(x.chunk(3)):
        layer.factors = (A[client : client + 1], B[client : client + 1])
        torch.testing.assert_close(layer(part), parts[client], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", bases())
@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize(("clients", "scaling"), [(1, 1.0), (3, 1.0), (3, 0.25)])
@pytest.mark.parametrize("first", [True, False])
def test_gradients_are_those_of_the_outputs(kind, shape, clients, scaling, first):
    """By finite differences; the first layer's input needs none."""
    layer = AdaptedLinear(bases()[kind].double().requires_grad_(False), scaling)
    inputs = [INPUTS[shape].double(), A[:clients].double(), B[:clients].double()]
    for tensor in inputs[first:]:
        tensor.requires_grad_()

    def outputs(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        layer.factors = (a, b)
        return layer(x)

    assert torch.autograd.gradcheck(outputs, inputs)


def test_an_input_of_another_memory_order_is_no_other_input():
    layer = AdaptedLinear(nn.Linear(6, 5).requires_grad_(False), 0.5)
    layer.factors = (A, B)
    x = INPUTS["tokens"].clone().requires_grad_()
    strided = INPUTS["tokens"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weights = torch.randn(5, 6, 4).permute(1, 2, 0)  # a gradient that is not contiguous either
    for tensor in (x, strided):
        (layer(tensor) * weights).sum().backward()
    assert torch.equal(layer(x), layer(strided))
    torch.testing.assert_close(x.grad, strided.grad)


def test_without_factors_it_is_the_frozen_layer():
    base, x = nn.Linear(6, 5), INPUTS["tokens"]
    layer = AdaptedLinear(base, 1.0)
    assert torch.equal(layer(x), base(x))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert AdaptedLinear(nn.Linear(6, 5, bias=False), 1.0).bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", INPUTS)
def test_each_client_has_its_own_head(bias, shape):
    x = INPUTS[shape]
    layer = HeadLinear(nn.Linear(6, 5, bias=bias))
    layer.tensors = (WEIGHT, BIAS if bias else None)
    parts = [
        part @ weight.T + (own if bias else 0)
        for part, weight, own in zip(x.chunk(3), WEIGHT, BIAS, strict=True)
    ]
    torch.testing.assert_close(layer(x), torch.cat(parts), rtol=1e-5, atol=1e-5)
    layer.tensors = (WEIGHT[1:2], BIAS[1:2] if bias else None)
    torch.testing.assert_close(layer(x.chunk(3)[1]), parts[1], rtol=1e-5, atol=1e-5)


def test_without_tensors_the_head_is_the_base():
    base, x = nn.Linear(6, 5), INPUTS["pooled"]
    layer = HeadLinear(base)
    assert torch.equal(layer(x), base(x))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
