"""Inputs that are made anew in the backward pass: the same gradients, nothing kept that the base drops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.vblora.tiny import FAMILIES, VOCABULARY, adapt, make_base, make_blueprint, make_inputs, make_state
from vblora.model import AdaptedModel
from vblora.recompute import maker


def gemma2(layers: int = 2) -> nn.Module:
    """Norms in float32 whose weights are added to 1, soft caps, gated GELU."""
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


def bases(dtype: torch.dtype) -> dict[str, nn.Module]:
    made = {family: make_base(family) for family in FAMILIES} | {"gemma2": gemma2()}
    return {name: base.to(dtype) for name, base in made.items()}


def gradients(model: AdaptedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = model.load(make_state(model.blueprint))
    model.bind(tensors)
    logits = model(**inputs).logits.double()
    loss = (logits * torch.arange(1.0, logits.numel() + 1).view(logits.shape).cos()).sum()
    found = torch.autograd.grad(loss, list(tensors.values()))
    model.unbind()
    return dict(zip(tensors, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_gradients_are_the_same(family, dtype):
    base, inputs = bases(dtype)[family], make_inputs(4)
    kept = gradients(adapt(base), inputs)
    again = gradients(AdaptedModel(copy.deepcopy(base), make_blueprint(base), recompute=True), inputs)
    for name, expected in kept.items():
        if family in ("bert", "roberta"):  # a layer norm made from its mean and deviation differs by rounding
            bound = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype] * float(expected.abs().max())
            torch.testing.assert_close(again[name], expected, rtol=0, atol=bound)
        else:
            assert torch.equal(again[name], expected), name


def kept_bytes(run: nn.Module, inputs: dict[str, Tensor], apart: list[Tensor]) -> int:
    """Of storages that the base's backward pass keeps, without those of `apart`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in apart}
    kept: dict[int, int] = {}
    seen, waiting = set(), [run(**inputs).logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.name() == "_CutBackward":
            continue
        seen.add(node)
        waiting += [edge[0] for edge in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in [*saved, *getattr(node, "saved_tensors", ())]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gemma2"])
def test_what_is_kept_beside_the_base(family, dtype):
    """Kept, it is one input a layer or group; made anew, it is the products with A alone."""
    base = bases(dtype)[family].requires_grad_(False)
    tokens, width, layers = 4 * 16, 32, 2
    tokens_in = torch.randint(3, VOCABULARY, (4, 16))
    inputs = {"inputs_embeds": base.get_input_embeddings()(tokens_in).detach().requires_grad_()}
    apart = [*base.parameters(), *base.buffers()]
    floor = kept_bytes(base, inputs, apart)

    def ours(recompute: bool) -> int:
        model = AdaptedModel(base_copy := copy.deepcopy(base), make_blueprint(base), recompute=recompute)
        model.bind(model.load(make_state(model.blueprint)))
        factors = [a for shared in model._inputs for a in (shared.factors[0], *shared.factors[1])]
        return kept_bytes(base_copy, inputs, [*base_copy.parameters(), *base_copy.buffers(), *factors])

    one, head = tokens * width * dtype.itemsize, 5000
    inner = tokens * 3 * 7 * layers * dtype.itemsize  # rank 3, up to seven layers a block
    # What cannot be made: the output of an attention in plain products; of the last block, for the head.
    others = {"gemma2": layers * one, "bert": one, "roberta": one, "llama": 0}[family]
    assert ours(recompute=True) - floor <= inner + others + head
    assert ours(recompute=False) - floor >= layers * tokens * (2 * width + 48) * dtype.itemsize - one


# --- Parts ---------------------------------------------------------------------------


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.linspace(0.5, 2, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.exp() * x.sin(),
        lambda x: WEIGHT * (x.exp() * x.sin()),
        lambda x: (x.exp() * x.sin()) * 1.7,
        lambda x: WEIGHT.bfloat16() * (x.exp() * x.sin()).bfloat16(),
        lambda x: functional.silu(x.exp()) * x,
        lambda x: functional.silu(x),
        lambda x: functional.gelu(x),
        lambda x: functional.gelu(x, approximate="tanh"),
    ],
)
def test_it_comes_out_to_the_bit(make):
    x = make(X.clone().requires_grad_())
    again = maker(x)
    assert again is not None
    assert torch.equal(again(), x)
    assert again().dtype is x.dtype


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_comes_out_to_rounding(affine):
    x = functional.layer_norm(X.clone().requires_grad_(), (5,), *([WEIGHT, WEIGHT] if affine else []))
    torch.testing.assert_close(maker(x)(), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.detach(),
        lambda x: x,
        lambda x: x.relu(),
        lambda x: WEIGHT * x,
        lambda x: (x @ x.T) * 2.0,
        lambda x: x + 1,
    ],
)
def test_what_nothing_kept_can_make_is_kept(make):
    assert maker(make(X.clone().requires_grad_())) is None
