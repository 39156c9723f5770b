"""Tokenised examples, the batches of a round, and their padding. NumPy and torch tensors, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Batch", "Examples", "collate", "plan_round", "shard"]

IGNORED = -100  # the label that torch's cross-entropy leaves out

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Tokenised texts, end to end.

    Attributes:
        tokens: int32, all texts' token ids one after another.
        starts: (n + 1,) int64, where each text starts; the last entry is the end.
        targets: (n,) int64. For classification the class; for language modelling the number of leading tokens
            (the prompt) that the loss leaves out.
    """

    tokens: NDArray[np.int32]
    starts: Indices
    targets: Indices

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> Indices:
        """(n,) tokens of each text."""
        return np.diff(self.starts)

    def text(self, index: int) -> NDArray[np.int32]:
        """Token ids of one text."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def take(self, indices: Indices) -> Examples:
        """The examples at `indices`, in that order."""
        starts = np.concatenate([[0], np.cumsum(self.lengths[indices])])
        parts = [self.text(int(index)) for index in indices]
        tokens = np.concatenate(parts) if parts else self.tokens[:0]
        return Examples(tokens, starts.astype(np.int64), self.targets[indices])


@dataclass(frozen=True)
class Batch:
    """Inputs of C clients, n rows each, padded to one length T. Rows that only fill up have no target.

    Attributes:
        tokens: (C * n, T) int64.
        mask: (C * n, T) int64, 1 on tokens.
        targets: (C * n,) int64; for language modelling the number of prompt tokens. -100 where a row only
            fills up.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor


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
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
    size = min(batch_size, len(examples))
    passes = -(-steps * size // len(examples))
    drawn = np.concatenate([generator.permutation(len(examples)) for _ in range(passes)])[: steps * size]
    by_length = drawn[np.argsort(-examples.lengths[drawn], kind="stable")]
    return [np.asarray(part, np.int64) for part in by_length.reshape(steps, size)]


def shard(count: int, index: int, shards: int) -> Indices:
    """Rows of the `index`-th of `shards` contiguous parts of `count` rows, as even as can be."""
    bounds = np.linspace(0, count, shards + 1).round().astype(np.int64)
    return np.arange(bounds[index], bounds[index + 1])


def collate(parts: Sequence[tuple[Examples, Indices]], pad: int, device: torch.device) -> Batch:
    """Pad the rows of C clients to one batch. A part is a client's examples and the rows to take, if any."""
    rows = max(len(indices) for _, indices in parts)
    longest = max(
        (int(examples.lengths[indices].max()) for examples, indices in parts if len(indices)), default=1
    )
    tokens = np.full((len(parts) * rows, max(1, longest)), pad, np.int64)
    mask = np.zeros_like(tokens)
    mask[:, 0] = 1  # attention over nothing is NaN; rows that only fill up look at one pad token
    targets = np.full(len(tokens), IGNORED, np.int64)
    for client, (examples, indices) in enumerate(parts):
        for row, index in enumerate(indices, start=client * rows):
            text = examples.text(int(index))
            tokens[row, : len(text)] = text
            mask[row, : len(text)] = 1
            targets[row] = examples.targets[index]
    to = [torch.from_numpy(array).to(device, non_blocking=True) for array in (tokens, mask, targets)]
    return Batch(*to)
