"""Row sources: what turns trainable tensors into the rows (C, S, b) that all layers are cut from.

A source is made for one blueprint and one device. `load` gives leaf tensors for C clients that start from one
state, `rows` composes them, `growth` keeps room in them, `selections` reads what would be sent. One load is
live at a time: the next one voids the tensors of the last. VB-LoRA's is here, the others in `vblora.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vblora.candidates import WIDTH, Candidates
from vblora.errors import ModelError
from vblora.spec import Blueprint, VBLoRASpec
from vblora.state import State, TopK

__all__ = ["MixedRows", "RowSource", "mix", "spread"]

Tensors = dict[str, Tensor]
Floats = NDArray[np.float32]


class RowSource(Protocol):
    """Turns the trainable tensors of C clients into rows."""

    def load(self, state: State, clients: int) -> Tensors:
        """Leaf tensors for `clients` clients that all start from `state`: (C, ...) float32 on the device."""

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(C, S, b), differentiable."""

    def growth(self) -> dict[str, Tensor]:
        """Values (n,) to append to the last axis of a tensor, by name; often empty.

        Call it every `CHECK_EVERY` steps.
        """

    def selections(self, tensors: Mapping[str, Tensor]) -> list[TopK | None]:
        """What each client selects now."""


class MixedRows:
    """VB-LoRA: every row is a mixture of k bank vectors (arXiv 2405.15179, eq. 3).

    Tensors: `bank` (C, h, b) and `logits` (C, N), flat as `Candidates` lays them.

    Args:
        blueprint: of a vblora adapter.
        device: of the tensors.
        width: candidates held of every row at first.
    """

    def __init__(self, blueprint: Blueprint, device: torch.device, width: int = WIDTH) -> None:
        if not isinstance(blueprint.spec, VBLoRASpec):
            raise ModelError(f"adapter {blueprint.spec.kind} has no bank to mix rows from")
        self._candidates = Candidates(blueprint.spec, blueprint.rows, device, width)
        self._device = device
        self._start: tuple[TopK, Floats] | None = None

    def load(self, state: State, clients: int) -> Tensors:
        if state.topk is None:
            raise ModelError("state of a vblora adapter lacks its selection")
        logits = self._candidates.start(state.topk).unsqueeze(0)
        self._start = state.topk, self._chosen(logits)[1][0]
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
        """What each client selects now; a row that did not move since `load` keeps the reference's bits."""
        return [
            self._restored(TopK(places, chosen[:, :1] - chosen[:, 1:]), chosen)
            for places, chosen in zip(*self._chosen(tensors["logits"]), strict=True)
        ]

    def _chosen(self, logits: Tensor) -> tuple[NDArray[np.int32], Floats]:
        """Places and logits of the chosen, (C, S, k) each."""
        selection = self._candidates.select(logits)
        chosen = logits.detach().gather(1, selection.slots.flatten(1)).view_as(selection.slots)
        return selection.places.int().cpu().numpy(), chosen.float().cpu().numpy()

    def _restored(self, topk: TopK, chosen: Floats) -> TopK:
        """`topk` with the reference's gaps where a row's chosen logits are those that `load` gave.

        Gaps taken from logits are rounded, so an untouched row would come back another by its last bits.
        """
        assert self._start is not None
        start, logits = self._start
        same = (topk.positions == start.positions).all(axis=1) & (chosen == logits).all(axis=1)
        return TopK(topk.positions, np.where(same[:, None], start.gaps, topk.gaps))


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


def spread(array: Floats, clients: int, device: torch.device) -> Tensor:
    """One array as a leaf tensor (C, ...) with a copy for each client."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    return tensor.expand(clients, *tensor.shape).clone().requires_grad_()
