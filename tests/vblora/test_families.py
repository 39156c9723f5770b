"""Models of many families, tiny and random, with SDPA: found, adapted, trained as merged weights are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call

from tests.vblora.test_model import reference_tensors, reference_weights
from tests.vblora.tiny import KINDS, LABELS, VOCABULARY, make_blueprint, make_inputs, make_state
from vblora.errors import ModelError
from vblora.merge import merge
from vblora.model import AdaptedModel, find_head, find_linears

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"vocab_size": VOCABULARY, "pad_token_id": 0}
DECODER = {**SIZES, "num_key_value_heads": 1}
WIDE = {**DECODER, "head_dim": 16}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
T5 |= {"decoder_start_token_id": 0, "num_labels": len(LABELS)}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "bos_token_id": 1}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "dense", "dense", "dense"]

# Maker, and the layers of a block.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)), BERT),
    "roberta": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, num_labels=3)), BERT),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(dim=32, n_heads=2, hidden_dim=48, n_layers=2, vocab_size=96, num_labels=3)
        ),
        ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    ),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), ["c_attn", "c_proj", "c_fc", "c_proj"]),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), LLAMA),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**WIDE)), LLAMA),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)), LLAMA),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE)), LLAMA),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WIDE)), LLAMA),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WIDE)), LLAMA),
    "phi3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)),
        ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
    ),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), ["q", "k", "v", "o"]),
    "t5-cls": (lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5)), ["q", "k", "v", "o"]),
}
WITHOUT_SDPA = {"gemma2"}  # its scores are capped


def make(family: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = FAMILIES[family][0]().eval()
        for parameter in base.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    return base


def inputs_of(family: str, rows: int) -> dict[str, Tensor]:
    inputs = make_inputs(rows)
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if family == "t5-cls":  # its classifier reads the state at the end token, one a row
        inputs["input_ids"][:, 0] = 1
    return inputs


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    real = inputs["attention_mask"].unsqueeze(-1)
    return found * real if found.dim() == 3 else found


def probe(found: Tensor) -> Tensor:
    weights = torch.randn(found.shape[1:], generator=torch.Generator().manual_seed(0))
    return (found * weights).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_trunk_is_found_and_attention_is_sdpa(family):
    base = make(family)
    wanted = FAMILIES[family][1]
    names = [linear.name.rsplit(".", 1)[-1] for linear in find_linears(base)]
    assert names[: 2 * len(wanted)] == wanted * 2 or family.startswith("t5")
    assert {*wanted} <= {*names}
    assert "lm_head" not in names
    config: Any = base.config
    assert config._attn_implementation == ("eager" if family in WITHOUT_SDPA else "sdpa")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_its_merged_weights_and_trains_like_them(family):
    base = make(family)
    model = AdaptedModel(copy.deepcopy(base), make_blueprint(base))
    state, inputs = make_state(model.blueprint, scale=0.1), inputs_of(family, 4)
    tensors = model.load(state)
    model.bind(tensors)
    found = logits(model, inputs)
    gradient = torch.autograd.grad(probe(found), tensors["bank"])[0][0]

    reference = reference_tensors(model.blueprint, state)
    weights = reference_weights(base, model.blueprint, reference)
    expected = logits(lambda **given: functional_call(base, weights, kwargs=given), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other = torch.autograd.grad(probe(expected), reference["bank"])[0]
    torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))

    merged = copy.deepcopy(base)
    merge(merged, state, model.blueprint)
    with torch.no_grad():
        torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)
        assert (logits(base, inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_three_clients_share_a_forward(family):
    base = make(family)
    model = AdaptedModel(base, make_blueprint(base, KINDS["lora"]))
    states = [make_state(model.blueprint, seed=seed, scale=0.1) for seed in range(3)]
    inputs = inputs_of(family, 6)
    model.bind(model.load(*states))
    together = logits(model, inputs)
    for client, state in enumerate(states):
        own = slice(2 * client, 2 * client + 2)
        model.bind(model.load(state))
        part = logits(model, {name: tensor[own] for name, tensor in inputs.items()})
        torch.testing.assert_close(part, together[own], rtol=1e-4, atol=1e-4)


# --- Mixtures of experts, tied layers, shared inputs ---------------------------------

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**WIDE, num_local_experts=4)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**WIDE, **MOE)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**WIDE, num_local_experts=4)),
    "switch": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(**{k: T5[k] for k in T5 if k != "num_labels"}, num_experts=2)
    ),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_refused_by_name_and_attention_can_be_adapted(family):
    base = EXPERTS[family]().eval()
    with pytest.raises(ModelError) as caught:
        find_linears(base)
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith("--target-modules all-linear: ")
    assert "experts (" in told
    assert "holds the weights of several experts, each of which sees tokens of its own" in told
    attention = "q,v" if family == "switch" else "q_proj,v_proj"
    assert f"{attention.split(',')[0]}" in told.split("name others, of ")[1].split(", ")
    found = find_linears(base, attention)
    assert found
    assert not [linear for linear in found if "experts" in linear.name]
    with pytest.raises(ModelError, match="fits no linear layer"):
        find_linears(base, "expert_0.wi" if family == "switch" else "gate_up_proj")
    if family == "switch":
        return
    model = AdaptedModel(base, make_blueprint(base, targets=attention))
    states = [make_state(model.blueprint, seed=seed, scale=0.1) for seed in range(2)]
    inputs = make_inputs(4)
    model.bind(model.load(*states))
    together = logits(model, inputs)
    for client, state in enumerate(states):
        own = slice(2 * client, 2 * client + 2)
        model.bind(model.load(state))
        part = logits(model, {name: tensor[own] for name, tensor in inputs.items()})
        torch.testing.assert_close(part, together[own], rtol=1e-4, atol=1e-4)


def test_weights_on_three_axes_that_are_no_experts_are_told_so():
    """XLNet's attention; a parameter may be a scalar, too."""
    base = hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=2, d_inner=48))
    base.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(
        ModelError, match=r"rel_attn \(\w+\) holds weights on three axes \(several experts\?\); these"
    ):
        find_linears(base)
    assert len(find_linears(base, "layer_1,layer_2")) == 2


def test_layers_used_again_and_again_share_an_adapter():
    """ALBERT runs one block for all layers."""
    base = hf.AlbertForSequenceClassification(
        hf.AlbertConfig(**SIZES, embedding_size=16, num_labels=3)
    ).eval()
    model = AdaptedModel(copy.deepcopy(base), make_blueprint(base))
    state, inputs = make_state(model.blueprint, scale=0.1), make_inputs(4)
    model.bind(model.load(state))
    merge(base, state, model.blueprint)
    torch.testing.assert_close(logits(model, inputs), logits(base, inputs), rtol=1e-4, atol=1e-4)


def test_a_layer_of_two_names_is_refused():
    base: Any = make("llama")
    base.model.layers[1].mlp.up_proj = base.model.layers[0].mlp.up_proj
    blueprint = make_blueprint(base)
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.up_proj is tied: model\.layers\.1\.mlp\.up_proj is the"
    ):
        AdaptedModel(base, blueprint)


def test_a_weight_of_two_layers_is_not_merged_into():
    base: Any = make("llama")
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    blueprint = make_blueprint(base)
    with pytest.raises(ModelError, match=r"up_proj shares its weight with model\.layers\.1\.mlp\.up_proj"):
        merge(base, make_state(blueprint), blueprint)
    AdaptedModel(base, blueprint)  # it can be trained: the products are added beside


def test_a_layer_that_reads_what_clients_share_takes_one_client_at_a_time():
    """DeBERTa projects relative positions by the layers that project texts."""
    config = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
    base = hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(**config, position_buckets=8, num_labels=3)
    ).eval()
    model = AdaptedModel(copy.deepcopy(base), make_blueprint(base))
    state, inputs = make_state(model.blueprint, scale=0.1), make_inputs(4)
    model.bind(model.load(state))
    merged = copy.deepcopy(base)
    merge(merged, state, model.blueprint)
    torch.testing.assert_close(logits(model, inputs), logits(merged, inputs), rtol=1e-4, atol=1e-4)
    model.bind(model.load(state, state))
    with pytest.raises(ModelError, match=r"is given 1 rows for 2 clients, .*; use --cohort 1"):
        model(**inputs)


def test_heads_of_other_families():
    assert [tensor.name for tensor in find_head(make("distilbert"))][:2] == [
        "pre_classifier.weight",
        "pre_classifier.bias",
    ]
    assert [tensor.name.rpartition(".")[0] for tensor in find_head(make("t5-cls"))][::2] == [
        "classification_head.dense",
        "classification_head.out_proj",
    ]
