"""Norms in one kernel: where they stand for a module's own, and that they equal it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.vblora.test_recompute import bases
from tests.vblora.tiny import adapt, make_base, make_inputs, make_state, outputs
from vblora.model import AdaptedModel
from vblora.norms import fuse_norms


@pytest.mark.parametrize("family", ["llama", "llama-cls"])
def test_llamas_norms_are_fused_and_give_the_same(family):
    base = make_base(family).requires_grad_(False)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    inputs = make_inputs(4)
    expected = outputs(base, inputs)
    own = copy.deepcopy(base)
    assert len(fuse_norms(own)) == 5
    torch.testing.assert_close(outputs(own, inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(copy.deepcopy(own), inputs), expected, rtol=1e-5, atol=1e-5)
    half, fused = base.bfloat16(), own.bfloat16()
    torch.testing.assert_close(outputs(fused, inputs), outputs(half, inputs), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "gemma2"])
def test_other_norms_are_left_alone(family):
    """Layer norms have a kernel; Gemma's weights are added to 1."""
    assert fuse_norms(bases(torch.float32)[family]) == []


class Odd(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class Gated(Odd):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


@pytest.mark.parametrize(
    "module", [Odd(), Gated(), nn.RMSNorm(4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()]
)
def test_what_is_no_such_norm_stays(module):
    assert fuse_norms(nn.Sequential(module)) == []


def test_an_input_of_another_type_takes_the_modules_own_way():
    base = make_base("llama").bfloat16()
    norm = copy.deepcopy(base.model.norm)
    fuse_norms(base)
    x = torch.randn(2, 32)
    assert torch.equal(base.model.norm(x), norm(x))
    assert base.model.norm(x).dtype is torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_kernels_gradients_are_those_and_its_output_can_be_made_again(dtype):
    found = []
    for fused, recompute in ((False, False), (True, False), (True, True)):
        base = make_base("llama").to("cuda", dtype)
        if fused:
            fuse_norms(base)
        plain = adapt(base)
        model = AdaptedModel(base, plain.blueprint, recompute=recompute)
        tensors = model.load(make_state(model.blueprint))
        model.bind(tensors)
        logits = model(**{name: value.cuda() for name, value in make_inputs(4).items()}).logits.double()
        found.append(torch.autograd.grad(logits.square().sum(), list(tensors.values())))
    bound = 1e-4 if dtype is torch.float32 else 0.1
    for own, fused_one, made in zip(*found, strict=True):
        assert (fused_one - own).norm() <= bound * own.norm()
        assert (made - fused_one).norm() <= bound * own.norm()
