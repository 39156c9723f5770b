"""A tiny encoder and a small csv: a whole run takes a second."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOPICS = {
    "food": "apple bread cheese soup salt rice fish tea plate cook spoon sweet".split(),
    "sport": "ball goal team race swim coach score match jump field medal win".split(),
    "space": "star moon orbit rocket comet planet dust light probe launch ring crater".split(),
}
COMMON = "the a and of in with some one then was very our".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers of width 32 with random weights, and its WordPiece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    folder.mkdir()
    words = [*SPECIAL, *COMMON, *(word for words in TOPICS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder
