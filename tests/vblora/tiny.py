"""Tiny random models of several families, blueprints for them, and states that are far from their start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from vblora.model import AdaptedModel, describe_base, find_head, find_linears
from vblora.spec import (
    AdapterSpec,
    BankOnlySpec,
    Blueprint,
    FFALoRASpec,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
    VBLoRASpec,
)
from vblora.state import State, TopK, initial_state

VOCABULARY = 96
LABELS = ("no", "yes", "perhaps")

_SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
_LLAMA = {**_SIZES, "num_key_value_heads": 1, "vocab_size": VOCABULARY, "pad_token_id": 0}
_LABELLED = {"vocab_size": VOCABULARY, "num_labels": len(LABELS), "pad_token_id": 0}

FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "bert": lambda layers: BertForSequenceClassification(
        BertConfig(**_SIZES, **_LABELLED, num_hidden_layers=layers)
    ),
    "roberta": lambda layers: RobertaForSequenceClassification(
        RobertaConfig(**_SIZES, **_LABELLED, num_hidden_layers=layers)
    ),
    "llama": lambda layers: LlamaForCausalLM(LlamaConfig(**_LLAMA, num_hidden_layers=layers)),
    "llama-cls": lambda layers: LlamaForSequenceClassification(
        LlamaConfig(**_LLAMA, num_labels=len(LABELS), num_hidden_layers=layers)
    ),
    "gpt2": lambda layers: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=layers, n_head=2, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    ),
}

# b = 16 divides every side of all families; 24 cuts rows.
VBLORA = VBLoRASpec(rank=3, num_vectors=40, vector_length=16, topk=2, seed=7)
LORA = LoRASpec(rank=3, alpha=5.0, seed=7)
KINDS: dict[str, AdapterSpec] = {
    "vblora": VBLORA,
    "lora": LORA,
    "ffa-lora": FFALoRASpec(rank=3, alpha=5.0, seed=7),
    "lora-xs": LoRAXSSpec(rank=3, seed=7),
    "uni-lora": UniLoRASpec(rank=3, theta_length=40, seed=7),
    "bank-only": BankOnlySpec(rank=3, num_vectors=40, vector_length=16, topk=2, seed=7),
}


def make_base(family: str, seed: int = 0, layers: int = 2) -> nn.Module:
    """A small model of `family`, in evaluation mode. Its weights are large enough for outputs to differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = FAMILIES[family](layers).eval()
        for parameter in base.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    return base


def make_blueprint(base: nn.Module, spec: AdapterSpec = VBLORA, targets: str = "all-linear") -> Blueprint:
    head = find_head(base)
    labels = LABELS if head else ()
    return Blueprint(spec, find_linears(base, targets), head, describe_base(base), labels)


def adapt(base: nn.Module, spec: AdapterSpec = VBLORA, targets: str = "all-linear") -> AdaptedModel:
    """An adapter in a copy of `base`."""
    return AdaptedModel(copy.deepcopy(base), make_blueprint(base, spec, targets))


def make_topk(blueprint: Blueprint, rng: np.random.Generator) -> TopK | None:
    """Any selection: places all over the order, gaps from none to large."""
    if blueprint.topk_shape is None:
        return None
    rows, k, h = blueprint.topk_shape
    positions = np.argsort(rng.random((rows, h)), axis=1)[:, :k].astype(np.int32)
    return TopK(positions, np.sort(rng.exponential(size=(rows, k - 1)), axis=1).astype(np.float32))


def make_state(blueprint: Blueprint, seed: int = 0, scale: float = 0.2) -> State:
    """A state in which every number, the head's and LoRA's B among them, is far from its start."""
    rng = np.random.default_rng(seed)
    start = initial_state(blueprint)
    dense = {
        name: (array + scale * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in start.dense.items()
    }
    return replace(start, version=3, dense=dense, topk=make_topk(blueprint, rng))


def make_inputs(rows: int, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Tokens padded on the right by 0, as many in each row as its number allows."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(3, VOCABULARY, (rows, length)))
    mask = torch.ones_like(tokens)
    for row in range(rows):
        mask[row, length - row % 3 :] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits on real tokens; those on padding are zeroed."""
    logits: Tensor = model(**inputs).logits
    if logits.dim() == 3:
        return logits * inputs["attention_mask"].unsqueeze(-1)
    return logits


def copy_head(base: nn.Module, blueprint: Blueprint, state: State) -> None:
    start = 0
    for tensor in blueprint.head:
        value = torch.from_numpy(state.dense["head"][start : start + tensor.size]).view(tensor.shape)
        base.get_parameter(tensor.name).data.copy_(value)
        start += tensor.size
