"""Greedy answers to held-out prompts: what a model says, beside what it would give the right answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig

from fl_client.base import longest_text
from fl_client.batches import Examples
from vblora.model import AdaptedModel
from vblora.state import State

__all__ = ["Asked", "asked_prompts", "generate", "references", "rows_with_prompts"]

CPU_TOKENS, GPU_TOKENS = 1 << 11, 1 << 14  # of a batch, prompts and answers, whose keys and values are held

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Asked:
    """A held-out prompt, as much of it as a row has left, and the rows that have it: several where it has
    several references."""

    prompt: Ids
    rows: tuple[int, ...]


def rows_with_prompts(examples: Examples) -> int:
    """How many rows have something to go on from, beside the token that starts every text."""
    return 0 if examples.prompts is None else int((examples.targets > 1).sum())


def asked_prompts(examples: Examples, count: int, seed: int) -> list[Asked]:
    """At most `count` different prompts, drawn from the seed, in the order of their first rows.

    Of the rows that have a prompt, cut to make room for the answer of each, the one with most of it is asked.
    """
    rows: dict[int, list[int]] = {}
    if examples.prompts is not None:
        for row in np.flatnonzero(examples.targets > 1).tolist():
            rows.setdefault(int(examples.prompts[row]), []).append(row)
    places = list(rows.values())
    drawn = np.random.default_rng(seed).permutation(len(places))[:count]
    return [Asked(_longest(examples, places[at]), tuple(places[at])) for at in np.sort(drawn)]


def references(tokenizer: Any, examples: Examples, asked: Asked) -> list[str]:
    """What the rows of a prompt answer, as text."""
    answers = [examples.text(row)[examples.targets[row] :] for row in asked.rows]
    return [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in answers]


def _longest(examples: Examples, rows: Sequence[int]) -> Ids:
    row = max(rows, key=lambda row: int(examples.targets[row]))
    return examples.text(row)[: examples.targets[row]]


@torch.no_grad()
def generate(
    model: AdaptedModel, state: State, tokenizer: Any, prompts: Sequence[Ids], most: int, pad: int
) -> list[str]:
    """Go on from prompts, word by word the likeliest, until the end or `most` tokens.

    Prompts of like length share a batch, padded on the left; keys and values of earlier tokens are kept.

    Args:
        model: the base with the adapter in place; its binding is used and released.
        state: of the adapter.
        tokenizer: turns tokens to text; special ones are left out.
        prompts: token ids.
        most: new tokens.
        pad: token id of padding.
    """
    texts = [""] * len(prompts)
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    tokens = CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS
    model.bind(model.load(state))
    try:
        while len(order):
            width = len(prompts[order[0]])
            size = max(1, tokens // (width + most))
            batch, order = order[:size], order[size:]
            room = _room(model, width, most)
            answers = _answers(model, [prompts[at] for at in batch], room, _ends(model, tokenizer), pad)
            for at, ids in zip(batch, answers, strict=True):
                texts[at] = tokenizer.decode(ids, skip_special_tokens=True)
    finally:
        model.unbind()
    return texts


def _answers(
    model: AdaptedModel, prompts: Sequence[Ids], most: int, ends: list[int], pad: int
) -> list[list[int]]:
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), pad, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    base: Any = model.base
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=ends
    )
    with _no_taste(base):
        found: Tensor = base.generate(
            input_ids=torch.from_numpy(tokens).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            generation_config=settings,
        )
    return [_until(row, ends) for row in found[:, width:].tolist()]


@contextmanager
def _no_taste(base: Any) -> Iterator[None]:
    """Hide the model's own generation settings: they fill in what ours leave open, penalties among it."""
    own = base.generation_config
    base.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        base.generation_config = own


def _until(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _ends(model: AdaptedModel, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model was made with."""
    base: Any = model.base
    own = getattr(base.generation_config, "eos_token_id", None)
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(token) for token in named if token is not None})


def _room(model: AdaptedModel, width: int, most: int) -> int:
    limit = longest_text(model.base)
    return most if limit is None else max(1, min(most, limit - width))
