"""The two layers alone: the low-rank path, the head, one client and many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora.layers import AdaptedLinear, HeadLinear, SharedInput

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
    layer.shared.bind((A, (B,)))
    parts = [base(part) + scaling * (part @ a.T) @ b for part, a, b in zip(x.chunk(3), A, B, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(parts), rtol=1e-5, atol=1e-5)
    for client, part in enumerate(x.chunk(3)):
        layer.shared.bind((A[client : client + 1], (B[client : client + 1],)))
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
        layer.shared.bind((a, (b,)))
        return layer(x)

    assert torch.autograd.gradcheck(outputs, inputs)


def test_an_input_of_another_memory_order_is_no_other_input():
    layer = AdaptedLinear(nn.Linear(6, 5).requires_grad_(False), 0.5)
    layer.shared.bind((A, (B,)))
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


# --- Layers that are given the same input --------------------------------------------


def sharing(
    clients: int, bias: bool = True, scaling: float = 0.5
) -> tuple[list[AdaptedLinear], list[AdaptedLinear]]:
    """Three layers in double precision by themselves, and the same three sharing their input."""
    generator = torch.Generator().manual_seed(1)
    bases = [nn.Linear(6, out, bias=bias).double().requires_grad_(False) for out in (5, 4, 7)]
    alone, shared = ([AdaptedLinear(base, scaling) for base in bases] for _ in range(2))
    a = torch.randn(clients, 6, 6, generator=generator).double().requires_grad_()
    bs = [torch.randn(clients, 2, len(base.weight), generator=generator).double() for base in bases]
    bs = [b.requires_grad_() for b in bs]
    for place, layer in enumerate(alone):
        layer.shared.bind((a[:, 2 * place : 2 * place + 2], (bs[place],)))
    SharedInput(shared).bind((a, tuple(bs)))
    return alone, shared


def leaves(layers: list[AdaptedLinear]) -> list[Tensor]:
    a, bs = layers[0].shared.factors
    return [a, *bs]


def weighed(y: Tensor) -> Tensor:
    return (y * torch.arange(1.0, y.numel() + 1).view(y.shape).cos()).sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("clients", [1, 3])
def test_layers_that_share_an_input_give_what_each_gives_alone(bias, shape, clients):
    alone, shared = sharing(clients, bias)
    x = INPUTS[shape].double().requires_grad_()
    expected, found = [layer(x) for layer in alone], [layer(x) for layer in shared]
    assert len({y.grad_fn for y in found}) == 1
    wanted = [x, *leaves(shared)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(sum(map(weighed, ys)), wanted) for ys in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_an_output_that_nobody_used_has_no_part_in_the_gradient(used):
    alone, shared = sharing(3)
    x = INPUTS["tokens"].double().requires_grad_()
    wanted = [x, leaves(shared)[0], leaves(shared)[1 + used]]
    found = torch.autograd.grad(weighed([layer(x) for layer in shared][used]), wanted)
    expected = torch.autograd.grad(weighed(alone[used](x)), wanted)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_layers_that_turn_out_to_have_other_inputs_part_for_good():
    """As q against k and v of an attention to another text."""
    alone, shared = sharing(1)
    x, other = INPUTS["tokens"].double().requires_grad_(), INPUTS["tokens"].double().flip(1).requires_grad_()
    for _ in range(2):
        expected = [alone[0](x), alone[1](other), alone[2](other)]
        found = [shared[0](x), shared[1](other), shared[2](other)]
        wanted = [x, other, *leaves(shared)]
        grads = [torch.autograd.grad(sum(map(weighed, ys)), wanted) for ys in (found, expected)]
        for mine, theirs in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert len({y.grad_fn for y in found}) == 3


def test_a_forward_that_broke_off_leaves_nothing_to_the_next():
    alone, shared = sharing(1)
    x = INPUTS["tokens"].double()
    shared[0](x + 1)
    found = [layer(x) for layer in shared]
    for mine, layer in zip(found, alone, strict=True):
        torch.testing.assert_close(mine, layer(x), rtol=1e-12, atol=1e-12)
    assert len({y.grad_fn for y in found}) == 1
    shared[0](x)
    shared[0].shared.bind(None)
    assert torch.equal(shared[1](x), shared[1].base(x))


# --- The head ------------------------------------------------------------------------


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
