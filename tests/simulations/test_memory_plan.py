"""What training is said to take, against what PyTorch keeps here and what GPUs were measured to take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fl_client.optim import AdamW
from simulations.bench.trainer7b import few_bits
from simulations.memory_plan import (
    GIB,
    BaseShape,
    Training,
    adapter_bytes,
    base_shape,
    fitting_settings,
    kept_of_layer,
    predicted_memory,
)
from simulations.skeleton import skeleton
from vblora.errors import ConfigError
from vblora.model import AdaptedModel, find_head, find_linears
from vblora.norms import fuse_norms
from vblora.spec import Blueprint, LoRASpec, VBLoRASpec
from vblora.state import initial_state
from vblora.weights import keep_unpacked

ROWS, LENGTH = 2, 32
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def llama(layers: int, dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=99)).to(dtype)


def bert(layers: int, dtype: torch.dtype) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    config = BertConfig(**sizes, num_hidden_layers=layers, vocab_size=99, num_labels=3)
    return BertForSequenceClassification(config).to(dtype)


def blueprint_of(base: nn.Module, **sizes: int) -> Blueprint:
    return Blueprint(VBLoRASpec(**sizes), find_linears(base), find_head(base))


def kept_bytes(base: nn.Module, recompute: bool = False) -> int:
    """What a forward leaves in the allocator's hands: all that autograd keeps, and the outputs."""
    blueprint = blueprint_of(base, rank=2, num_vectors=32, vector_length=32)
    model = AdaptedModel(base, blueprint, recompute=recompute)
    tokens = torch.randint(99, (ROWS, LENGTH))
    model.bind(model.load(initial_state(blueprint)))
    asked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    model(**asked)  # the first call keeps what later ones find
    gc.collect()  # what is freed while it is counted would count as less
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        held = model(**asked)
    assert held.logits.requires_grad
    model.unbind()
    events = prof.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def of_a_layer(make: Callable[[int], nn.Module], **options: Any) -> float:
    """Bytes a token that one more layer keeps."""
    two, three = (kept_bytes(make(layers), **options) for layers in (2, 3))
    return (three - two) / (ROWS * LENGTH)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [llama, bert])
def test_what_a_layer_keeps(family: Any, dtype: str, recompute: bool, fused: bool):
    def make(layers: int) -> nn.Module:
        base: nn.Module = family(layers, DTYPES[dtype])
        if fused:
            fuse_norms(base)
        return base

    # PyTorch's rms_norm is no kernel of its own on a CPU, and keeps what its parts keep.
    predicted = kept_of_layer(
        base_shape(make(2)), DTYPES[dtype].itemsize, recompute, fused_norms=fused and family is bert
    )
    assert of_a_layer(make, recompute=recompute) == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantised_base_keeps_as_much_and_takes_less(quantize: str):
    pytest.importorskip("bitsandbytes")
    two = quantised(llama(2, torch.bfloat16), quantize)
    shape = base_shape(two)
    memory = predicted_memory(shape, blueprint_of(two, vector_length=32), Training(1, 1, quantize=quantize))
    held = sum(parameter.nbytes for parameter in two.parameters())
    if quantize == "4bit":
        states = [layer.weight.quant_state for layer in two.modules() if isinstance(layer, Linear4bit())]
        held += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    assert memory.base == pytest.approx(held, rel=0.01)
    kept = of_a_layer(lambda layers: quantised(llama(layers, torch.bfloat16), quantize), recompute=True)
    assert kept == pytest.approx(kept_of_layer(shape, 2, False, fused_norms=False), rel=0.05)


def Linear4bit() -> type[nn.Module]:
    from bitsandbytes.nn import Linear4bit

    return Linear4bit


def quantised(base: nn.Module, quantize: str) -> nn.Module:
    """A model with its linear layers as `--quantize` has them."""
    for linear in find_linears(base):
        layer = few_bits(base.get_submodule(linear.name), quantize)
        parent, _, child = linear.name.rpartition(".")
        setattr(base.get_submodule(parent), child, layer)
    keep_unpacked(base)
    return base


def test_what_a_base_and_an_adapter_take():
    base = llama(2, torch.bfloat16)
    blueprint = blueprint_of(base, rank=2, num_vectors=96, vector_length=32)
    memory = predicted_memory(base_shape(base), blueprint, Training(1, 1))
    assert memory.base == sum(parameter.nbytes for parameter in base.parameters())
    model = AdaptedModel(base, blueprint)
    tensors = model.load(initial_state(blueprint))
    optimiser = AdamW(dict.fromkeys(tensors, 0.1))
    gradients = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    optimiser.step(tensors, gradients, None)
    held = [*tensors.values(), *gradients.values(), *optimiser._first.values(), *optimiser._second.values()]
    rows = blueprint.rows * blueprint.vector_length
    composed = rows * (4 + 2 + 2 + 4)
    expected = sum(tensor.nbytes for tensor in held) + model.source._candidates.order.nbytes + composed
    assert memory.adapter == expected
    assert adapter_bytes(Blueprint(LoRASpec(rank=2), find_linears(base)), 2) > 16 * rows


def test_shapes_of_the_meta_device():
    shape = base_shape(skeleton("llama-2-7b").model)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert shape == BaseShape(
        linear=32 * layer,
        other=2 * 32000 * 4096 + 65 * 4096,
        largest=4096 * 11008,
        layers=32,
        hidden=4096,
        queries=4096,
        keys=4096,
        inner=11008,
        vocabulary=32000,
        gated=True,
    )
    small = base_shape(skeleton("llama-3.2-3b").model)
    assert (small.queries, small.keys) == (3072, 1024)
    assert base_shape(skeleton("roberta-large").model).vocabulary == 0


# Llama-2-7B's shape, rank 4, h 2048, b 256, bfloat16: peak GiB of a plain prototype on an H200 (DESIGN.md).
@pytest.mark.parametrize(("rows", "length", "measured"), [(1, 256, 14.1), (4, 512, 23.9), (4, 1024, 34.9)])
def test_peaks_that_were_measured(rows: int, length: int, measured: float):
    base = skeleton("llama-2-7b").model
    blueprint = blueprint_of(base, rank=4, num_vectors=2048, vector_length=256)
    memory = predicted_memory(base_shape(base), blueprint, Training(rows, length, fused_norms=False))
    assert memory.allocated / GIB == pytest.approx(measured, rel=0.05)


def test_what_fits_is_named_from_fast_to_slow():
    base = skeleton("llama-2-7b").model
    shape, blueprint = base_shape(base), blueprint_of(base, rank=4, num_vectors=2048, vector_length=256)
    assert fitting_settings(shape, blueprint, 80)[0][0] == Training(4, 512)
    eight = fitting_settings(shape, blueprint, 8)
    assert eight
    assert all(training.quantize == "4bit" for training, _ in eight)
    assert eight[0][0].accumulate > 1
    assert Training(4, 512, quantize="4bit", checkpointing=True) in [training for training, _ in eight]
    assert all(memory.device <= 8 * GIB for _, memory in eight)
    assert fitting_settings(shape, blueprint, 3) == []
    for name in ("activations", "allocated"):
        taken = [
            getattr(predicted_memory(shape, blueprint, Training(4, 512, **options)), name)
            for options in ({}, {"recompute": True}, {"checkpointing": True}, {"accumulate": 4})
        ]
        assert taken[0] > max(taken[1:])


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"rows": 2, "accumulate": 3}, "accumulate is 3, expected at most the 2 texts"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"quantize": "2bit"}, "quantize is '2bit'"),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, Any], fault: str):
    with pytest.raises(ConfigError, match=fault):
        Training(**given)
