"""Tokenised examples, the batches of a round, and their padding. NumPy and torch tensors, no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Batch",
    "Examples",
    "Shape",
    "by_length",
    "collate",
    "padding",
    "plan_lengths",
    "plan_round",
    "shard",
]

IGNORED = -100  # the label that torch's cross-entropy leaves out

Indices = NDArray[np.int64]
Shape = NDArray[np.int64]  # (steps, 2) rows and longest text of each batch of a round


@dataclass(frozen=True)
class Examples:
    """Tokenised texts, end to end.

    Attributes:
        tokens: int32, all texts' token ids one after another.
        starts: (n + 1,) int64, where each text starts; the last entry is the end.
        targets: (n,) int64. For classification the class; for language modelling the number of leading tokens
            (the prompt) that the loss leaves out.
        begins: bool as `tokens`, true where a text begins, for packed rows that hold several; else None.
        prompts: (n,) int64, for rows with completions: the number of each row's prompt, the same for equal
            ones, however much of them is left where rows are cut; else None.
    """

    tokens: NDArray[np.int32]
    starts: Indices
    targets: Indices
    begins: NDArray[np.bool_] | None = None
    prompts: Indices | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def unit(self) -> str:
        """What one example is, for people."""
        return "training texts" if self.begins is None else "packed rows of training text"

    @property
    def lengths(self) -> Indices:
        """(n,) tokens of each text."""
        return np.diff(self.starts)

    def text(self, index: int) -> NDArray[np.int32]:
        """Token ids of one text."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def take(self, indices: Indices) -> Examples:
        """The examples at `indices`, in that order."""
        lengths = self.starts[indices + 1] - self.starts[indices]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.arange(starts[-1]) + np.repeat(self.starts[indices] - starts[:-1], lengths)
        begins = None if self.begins is None else self.begins[places]
        prompts = None if self.prompts is None else self.prompts[indices]
        return Examples(self.tokens[places], starts, self.targets[indices], begins, prompts)


@dataclass(frozen=True)
class Batch:
    """Inputs of C clients, n rows each, padded to one length T. Rows that only fill up have no target.

    Attributes:
        tokens: (C * n, T) int64.
        mask: (C * n, T) int64, 1 on tokens.
        targets: (C * n,) int64; for language modelling the number of prompt tokens. -100 where a row only
            fills up.
        positions: (C * n, T) int64, for packed rows: each token's place in its own text; else None.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor
    positions: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with.

        Where there is no mask, transformers keeps texts apart by positions that start anew; the padding
        behind them is one more text.
        """
        if self.positions is None:
            return {"input_ids": self.tokens, "attention_mask": self.mask}
        return {"input_ids": self.tokens, "position_ids": self.positions}

    def chunk(self, clients: int) -> list[Batch]:
        """The batch of each client."""
        cut = [tensor.chunk(clients) for tensor in (self.tokens, self.mask, self.targets)]
        positions = [None] * clients if self.positions is None else self.positions.chunk(clients)
        return [Batch(*own) for own in zip(*cut, positions, strict=True)]


def plan_round(examples: Examples, steps: int, batch_size: int, seed: Sequence[int]) -> list[Indices]:
    """Which examples each local step of a round trains on.

    Examples are drawn without replacement, pass after pass. Those of one round are batched by length, which
    saves padding, longest batch first: the clients of a cohort then meet their long batches in the same step.

    Args:
        examples: of one client, at least one.
        steps: local steps.
        batch_size: examples a step; fewer where the client holds fewer.
        seed: names the draw, such as (seed, round, client).
    """
    return plan_lengths(examples.lengths, steps, batch_size, seed)


def plan_lengths(lengths: Indices, steps: int, batch_size: int, seed: Sequence[int]) -> list[Indices]:
    """As `plan_round`, from the lengths of a client's texts alone."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
    size = min(batch_size, len(lengths))
    passes = -(-steps * size // len(lengths))
    drawn = np.concatenate([generator.permutation(len(lengths)) for _ in range(passes)])[: steps * size]
    by_length = drawn[np.argsort(-lengths[drawn], kind="stable")]
    return [np.asarray(part, np.int64) for part in by_length.reshape(steps, size)]


def padding(shapes: Sequence[Shape]) -> float:
    """Tokens of clients trained side by side over their tokens one after another: what padding costs."""
    steps = max(len(shape) for shape in shapes)
    widest = np.zeros((steps, 2), np.int64)
    for shape in shapes:
        widest[: len(shape)] = np.maximum(widest[: len(shape)], shape)
    alone = sum(int(shape.prod(axis=1).sum()) for shape in shapes)
    return len(shapes) * int(widest.prod(axis=1).sum()) / max(1, alone)


def by_length(examples: Examples, tokens: int) -> list[Indices]:
    """All examples in batches of similar length, longest first, for evaluation.

    A batch holds at most `tokens` tokens, padding included, and at least one example.
    """
    order = np.argsort(-examples.lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, tokens // max(1, int(examples.lengths[order[start]])))
        batches.append(order[start : start + count])
        start += count
    return batches


def shard(count: int, index: int, shards: int) -> Indices:
    """Rows of the `index`-th of `shards` contiguous parts of `count` rows, as even as can be."""
    bounds = np.linspace(0, count, shards + 1).round().astype(np.int64)
    return np.arange(bounds[index], bounds[index + 1])


def collate(
    parts: Sequence[tuple[Examples, Indices]],
    pad: int,
    device: torch.device,
    length: Callable[[int], int] = int,
) -> Batch:
    """Pad the rows of C clients to one batch.

    Args:
        parts: a client's examples and the rows to take, if any.
        pad: token id of padding.
        device: of the batch.
        length: how long the batch is, given its longest text.
    """
    rows = max(len(indices) for _, indices in parts)
    lengths = [examples.starts[indices + 1] - examples.starts[indices] for examples, indices in parts]
    longest = length(max(int(part.max(initial=1)) for part in lengths))
    tokens = np.full((len(parts) * rows, longest), pad, np.int64)
    mask = np.zeros_like(tokens)
    mask[:, 0] = 1  # attention over nothing is NaN; rows that only fill up look at one pad token
    targets = np.full(len(tokens), IGNORED, np.int64)
    begins = np.zeros(tokens.shape, np.bool_) if parts[0][0].begins is not None else None
    for client, (examples, indices) in enumerate(parts):
        own = slice(client * rows, client * rows + len(indices))
        real, taken = np.arange(longest) < lengths[client][:, None], examples.take(indices)
        tokens[own][real] = taken.tokens
        mask[own][real] = 1
        targets[own] = taken.targets
        if begins is not None:
            begins[own][real] = taken.begins
    arrays = [tokens, mask, targets] + ([] if begins is None else [_positions(begins, mask)])
    return Batch(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def _positions(begins: NDArray[np.bool_], mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each token's place in its own text; padding counts as one."""
    places = np.arange(begins.shape[1])
    begins = begins | (np.diff(mask, axis=1, prepend=1) < 0)  # the first of the padding
    return np.asarray(places - np.maximum.accumulate(np.where(begins, places, 0), axis=1), np.int64)
