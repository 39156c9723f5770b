"""Models of real shapes with random weights, made on their device, and texts for them.

What a step costs does not depend on the weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fl_client.batches import Examples

__all__ = ["LABELS", "SHAPES", "Shape", "build", "make_examples", "twin"]

LABELS = ("a", "b", "c", "d", "e")


@dataclass(frozen=True)
class Shape:
    """A model, what one client-step trains on, and the cohorts to try.

    Attributes:
        sizes: of the model's config; a Llama where it has key-value heads, else a BERT with a classifier.
        rows, length: texts a step, tokens of each.
        num_vectors, vector_length: h and b, on all linear layers.
        cohorts: clients side by side; 1 comes first.
        rank: r.
    """

    sizes: dict[str, Any]
    rows: int
    length: int
    num_vectors: int
    vector_length: int
    cohorts: tuple[int, ...]
    rank: int = 4


def _llama(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 32000,
    }


MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "num_labels": len(LABELS),
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

SHAPES = {
    "llama-1.1b": Shape(_llama(2048, 5632, 22, 32, 4), 1, 128, 256, 256, (1, 4, 8, 16, 32)),
    "llama-2-7b": Shape(_llama(4096, 11008, 32, 32, 32), 1, 256, 2048, 256, (1, 4, 8, 16)),
    "llama-2-13b": Shape(_llama(5120, 13824, 40, 40, 40), 1, 256, 2048, 256, (1, 4), rank=6),
    "minilm": Shape(MINILM, 8, 32, 256, 128, (1, 2, 4, 8)),
}


def build(shape: Shape, device: torch.device) -> nn.Module:
    """The model with random weights, made on its device; bfloat16 on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with torch.device(device), torch.random.fork_rng(enabled=device.type == "cpu"):
            model: nn.Module
            if "num_key_value_heads" in shape.sizes:
                model = LlamaForCausalLM(LlamaConfig(**shape.sizes, use_cache=False))
            else:
                model = BertForSequenceClassification(BertConfig(**shape.sizes))
    finally:
        torch.set_default_dtype(before)
    return model


def twin(base: nn.Module) -> nn.Module:
    """The same model over the same weights: only the modules are copied."""
    shared: list[Tensor] = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def make_examples(shape: Shape, seed: int, classes: bool, rows: int = 0) -> Examples:
    """Texts of one length: `rows`, or as many as a step takes."""
    rows = rows or shape.rows
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1000, shape.sizes["vocab_size"], rows * shape.length).astype(np.int32)
    starts = np.arange(0, len(tokens) + 1, shape.length, dtype=np.int64)
    targets = rng.integers(0, len(LABELS), rows) if classes else np.zeros(rows, np.int64)
    return Examples(tokens, starts, targets)
