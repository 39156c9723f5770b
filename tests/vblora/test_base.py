"""Which layers are adapted, where the head is, and what of the base is left alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from tests.vblora.test_model import (
    probe,
    trained,
)
from tests.vblora.tiny import (
    LORA,
    VBLORA,
    adapt,
    copy_head,
    make_base,
    make_blueprint,
    make_inputs,
    make_state,
)
from vblora.errors import ModelError
from vblora.model import AdaptedModel, describe_base, find_head, find_linears
from vblora.spec import (
    HeadTensor,
    Linear,
)
from vblora.state import initial_state

# --- The base
# ---------------------------------------------------------------------------------------------------


def test_unbound_the_model_is_the_frozen_base():
    base = make_base("bert")
    model, inputs = adapt(base), make_inputs(3)
    expected = base(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    model.bind(model.load(make_state(model.blueprint)))
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-2)
    model.unbind()
    assert torch.equal(model(**inputs).logits, expected)


def test_the_base_is_frozen():
    model = adapt(make_base("bert").train())
    assert not model.base.training
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
    kept = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    tensors = model.load(make_state(model.blueprint))
    model.bind(tensors)
    probe(model(**make_inputs(2)).logits).backward()
    assert all(tensor.grad is not None for tensor in tensors.values())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.base.state_dict().items())


def test_a_16_bit_base_gets_16_bit_factors_from_float32_tensors():
    base = make_base("llama").bfloat16()
    model = adapt(base)
    state, inputs = make_state(model.blueprint), make_inputs(3)
    logits, gradients = trained(model, state, inputs)
    assert logits.dtype is torch.bfloat16
    assert all(gradient.dtype is torch.float32 for gradient in gradients.values())
    expected, _ = trained(adapt(make_base("llama")), state, inputs)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize(
    ("family", "names", "outside"),
    [
        ("bert", ["query", "key", "value", "dense", "dense", "dense"], ["bert.pooler.dense"]),
        ("roberta", ["query", "key", "value", "dense", "dense", "dense"], []),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"], []),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
        ("llama-cls", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
    ],
)
def test_all_linear_is_every_layer_of_the_trunk(family, names, outside):
    found = find_linears(make_base(family))
    assert [linear.name.rsplit(".", 1)[-1] for linear in found] == names * 2 + ["dense"] * len(outside)
    assert [linear.name for linear in found[len(names) * 2 :]] == outside


def test_sides_are_in_and_out():
    by_name = {linear.name: linear for linear in find_linears(make_base("gpt2"))}
    assert by_name["transformer.h.0.mlp.c_fc"] == Linear("transformer.h.0.mlp.c_fc", 32, 128)
    by_name = {linear.name: linear for linear in find_linears(make_base("llama"))}
    assert by_name["model.layers.1.self_attn.k_proj"] == Linear("model.layers.1.self_attn.k_proj", 32, 16)


def test_targets_fit_whole_names_from_their_end():
    base = make_base("bert")
    names = [linear.name for linear in find_linears(base, " query , attention.output.dense ")]
    assert [name.split("layer.")[1] for name in names] == [
        "0.attention.self.query",
        "0.attention.output.dense",
        "1.attention.self.query",
        "1.attention.output.dense",
    ]
    whole = "bert.encoder.layer.1.intermediate.dense"
    assert [linear.name for linear in find_linears(base, whole)] == [whole]


@pytest.mark.parametrize(
    "targets", ["quer", "uery", "query,nonsense", "classifier", "encoder", "all-linear,query"]
)
def test_a_target_that_fits_nothing_is_named(targets):
    with pytest.raises(
        ModelError, match=r"--target-modules: '.+' fits no linear layer; the base has dense, key"
    ):
        find_linears(make_base("bert"), targets)


def test_no_target_at_all_is_refused():
    with pytest.raises(ModelError, match="no linear layer to adapt"):
        make_blueprint(make_base("bert"), VBLORA, " , ")


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", [("classifier.weight", (3, 32)), ("classifier.bias", (3,))]),
        (
            "roberta",
            [
                ("classifier.dense.weight", (32, 32)),
                ("classifier.dense.bias", (32,)),
                ("classifier.out_proj.weight", (3, 32)),
                ("classifier.out_proj.bias", (3,)),
            ],
        ),
        ("llama-cls", [("score.weight", (3, 32))]),
        ("llama", []),
        ("gpt2", []),
    ],
)
def test_the_head_is_what_stands_outside_the_trunk(family, head):
    assert find_head(make_base(family)) == tuple(HeadTensor(*tensor) for tensor in head)


def test_a_language_model_without_labels_has_no_head():
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    assert find_head(BertForMaskedLM(config)) == ()


def test_a_head_that_is_not_linear_is_refused():
    base = make_base("bert")
    base.norm = nn.LayerNorm(32)
    with pytest.raises(ModelError, match="task head: norm is a LayerNorm; only linear layers"):
        find_head(base)


def test_a_base_is_described_by_its_sizes():
    assert describe_base(make_base("bert")) == "bert-32-2-96"
    assert describe_base(make_base("gpt2")) == "gpt2-32-2-96"
    assert describe_base(nn.Linear(2, 2)) == "Linear"


def test_a_base_that_does_not_fit_the_blueprint_is_refused_by_layer():
    base = make_base("bert")
    blueprint = make_blueprint(base)
    wrong = replace(
        blueprint,
        linears=(
            Linear("bert.pooler.dense", 32, 64),
            Linear("bert.pooler.nothing", 4, 4),
            Linear("bert", 4, 4),
        ),
        head=(HeadTensor("classifier.weight", (4, 32)), HeadTensor("classifier.scale", (1,))),
    )
    with pytest.raises(ModelError) as caught:
        AdaptedModel(base, wrong)
    assert str(caught.value) == (
        "base model does not fit the adapter: bert.pooler.dense is 32 to 32, expected 32 to 64; "
        "bert.pooler.nothing is no linear layer, expected 4 to 4; bert is no linear layer, expected 4 to 4; "
        "head tensor classifier.weight has shape (3, 32), expected (4, 32); "
        "head tensor classifier.scale has shape None, expected (1,)"
    )
    AdaptedModel(base, blueprint)  # nothing was replaced by the refusal
    with pytest.raises(ModelError, match="no linear layer, expected"):
        AdaptedModel(base, blueprint)  # a second adapter would stand on the first


def test_the_start_leaves_a_lora_model_as_it_was():
    base = make_base("bert")
    model = adapt(base, LORA)
    state = initial_state(model.blueprint)
    model.bind(model.load(state))
    copy_head(base, model.blueprint, state)
    inputs = make_inputs(3)
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
    assert not np.any(state.dense["head"][-3:])
