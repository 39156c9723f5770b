"""Row sources: what turns trainable tensors into the rows (C, S, b) that all layers are cut from.

A source is made for one blueprint and one device. `load` gives leaf tensors for C clients that start from one state, `rows`
composes them, `grown` keeps room in them, `selections` reads what would be sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vblora.candidates import Candidates
from vblora.errors import ModelError
from vblora.spec import Blueprint, VBLoRASpec
from vblora.state import State, TopK

__all__ = ["FreeRows", "MixedRows", "RowSource", "row_source"]

Tensors = dict[str, Tensor]


class RowSource(Protocol):
    """Turns the trainable tensors of C clients into rows."""

    def load(self, state: State, clients: int) -> Tensors:
        """Leaf tensors for `clients` clients that all start from `state`, each (C, ...), float32, on the device."""

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(C, S, b), differentiable."""

    def growth(self) -> dict[str, Tensor]:
        """Values (n,) to append to the last axis of a tensor, by name; call every `CHECK_EVERY` steps. Often empty."""

    def selections(self, tensors: Mapping[str, Tensor]) -> list[TopK | None]:
        """What each client selects now."""


class FreeRows:
    """LoRA: the rows themselves are trained, as the one tensor `rows` (C, S, b)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def load(self, state: State, clients: int) -> Tensors:
        return {"rows": spread(state.dense["rows"], clients, self._device)}

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["rows"]

    def growth(self) -> dict[str, Tensor]:
        return {}

    def selections(self, tensors: Mapping[str, Tensor]) -> list[TopK | None]:
        return [None] * len(tensors["rows"])


class MixedRows:
    """VB-LoRA: every row is a mixture of k bank vectors (arXiv 2405.15179, eq. 3).

    Tensors: `bank` (C, h, b) and `logits` (C, N), flat as `Candidates` lays them.
    """

    def __init__(self, blueprint: Blueprint, device: torch.device) -> None:
        if not isinstance(blueprint.spec, VBLoRASpec):
            raise ModelError(f"adapter {blueprint.spec.kind} has no bank to mix rows from")
        self._candidates = Candidates(blueprint.spec, blueprint.rows, device)
        self._device = device

    def load(self, state: State, clients: int) -> Tensors:
        if state.topk is None:
            raise ModelError("state of a vblora adapter lacks its selection")
        logits = self._candidates.start(state.topk)
        return {
            "bank": spread(state.dense["bank"], clients, self._device),
            "logits": logits.repeat(clients, 1).requires_grad_(),
        }

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        bank, logits = tensors["bank"], tensors["logits"]
        slots = self._candidates.select(logits).slots
        return mix(bank, logits, slots, self._candidates.order)

    def growth(self) -> dict[str, Tensor]:
        grown = self._candidates.grow()
        return {"logits": torch.cat(grown)} if grown else {}

    def selections(self, tensors: Mapping[str, Tensor]) -> list[TopK | None]:
        selection = self._candidates.select(tensors["logits"])
        logits = tensors["logits"].detach()
        chosen = logits.gather(1, selection.slots.flatten(1)).view_as(selection.slots)
        gaps = (chosen[..., :1] - chosen[..., 1:]).float().cpu().numpy()
        places = selection.places.cpu().numpy().astype(np.int32)
        return [TopK(p, g) for p, g in zip(places, gaps, strict=True)]


def mix(bank: Tensor, logits: Tensor, slots: Tensor, order: Tensor) -> Tensor:
    """Rows as softmax mixtures of the chosen bank vectors.

    Args:
        bank: (C, h, b).
        logits: (C, N) flat.
        slots: (C, S, k) int64, chosen logits.
        order: (N,) bank vector that each slot scores.

    Returns:
        (C, S, b) in the bank's dtype.
    """
    clients, rows, k = slots.shape
    h, b = bank.shape[1:]
    weights = logits.gather(1, slots.flatten(1)).view(clients, rows, k).softmax(dim=-1)
    shift = torch.arange(0, clients * h, h, device=slots.device).view(-1, 1, 1)
    vectors = order[slots].long() + shift
    mixed = functional.embedding_bag(
        vectors.view(-1, k),
        bank.reshape(-1, b),
        per_sample_weights=weights.view(-1, k).to(bank.dtype),
        mode="sum",
    )
    return mixed.view(clients, rows, b)


def row_source(blueprint: Blueprint, device: torch.device) -> RowSource:
    """The source that a blueprint's adapter trains."""
    return MixedRows(blueprint, device) if isinstance(blueprint.spec, VBLoRASpec) else FreeRows(device)


def spread(
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]], clients: int, device: torch.device
) -> Tensor:
    """One array as a leaf tensor (C, ...) with a copy for each client."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    return tensor.expand(clients, *tensor.shape).clone().requires_grad_()
