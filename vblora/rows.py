"""Row sources: what turns trainable tensors into the rows (C, S, b) that all layers are cut from.

A source is made for one blueprint and one device. `load` gives leaf tensors for C clients that start from one
state, `rows` composes them, `growth` keeps room in them, `selections` reads what would be sent. One load is
live at a time: the next one voids the tensors of the last. VB-LoRA's is here, the others in `vblora.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vblora.candidates import WIDTH, Candidates
from vblora.errors import ModelError
from vblora.spec import Blueprint, VBLoRASpec
from vblora.start import order_of
from vblora.state import State, TopK

__all__ = ["MixedRows", "RowSource", "mix", "stack"]

Tensors = dict[str, Tensor]
Floats = NDArray[np.float32]


class RowSource(Protocol):
    """Turns the trainable tensors of C clients into rows."""

    def load(self, *states: State) -> Tensors:
        """Leaf tensors for C clients, each starting from its own state: (C, ...) float32 on the device."""

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
        self._candidates = Candidates(blueprint.spec, blueprint.rows, device, width, order_of(blueprint))
        self._device = device
        self._starts: list[tuple[TopK, Floats]] = []

    def load(self, *states: State) -> Tensors:
        selections = [state.topk for state in states if state.topk is not None]
        if len(selections) < len(states):
            raise ModelError("state of a vblora adapter lacks its selection")
        apart = {id(topk): topk for topk in selections}  # most clients of a cohort start from one
        which = [list(apart).index(id(topk)) for topk in selections]
        logits = self._candidates.start(*apart.values())
        chosen = self._chosen(logits)[1]
        self._starts = [(topk, chosen[at]) for topk, at in zip(selections, which, strict=True)]
        return {
            "bank": stack([state.dense["bank"] for state in states], self._device),
            "logits": logits[which].requires_grad_(),
        }

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        bank, logits = tensors["bank"], tensors["logits"]
        slots = self._candidates.select(logits).slots
        return mix(bank, logits, slots, self._candidates.order)

    def growth(self) -> dict[str, Tensor]:
        grown = self._candidates.grow()
        return {"logits": torch.cat(grown)} if grown else {}

    def selections(self, tensors: Mapping[str, Tensor]) -> list[TopK | None]:
        """What each client selects now; a row that did not move since `load` keeps its bits."""
        found = zip(self._starts, *self._chosen(tensors["logits"]), strict=True)
        return [
            _restored(start, TopK(places, chosen[:, :1] - chosen[:, 1:]), chosen)
            for start, places, chosen in found
        ]

    def _chosen(self, logits: Tensor) -> tuple[NDArray[np.int32], Floats]:
        """Places and logits of the chosen, (C, S, k) each."""
        selection = self._candidates.select(logits)
        chosen = logits.detach().gather(1, selection.slots.flatten(1)).view_as(selection.slots)
        return selection.places.int().cpu().numpy(), chosen.float().cpu().numpy()


def _restored(start: tuple[TopK, Floats], topk: TopK, chosen: Floats) -> TopK:
    """`topk` with the gaps that it started with where a row's chosen logits are those that `load` gave.

    Gaps taken from logits are rounded, so an untouched row would come back another by its last bits.
    """
    before, logits = start
    same = (topk.positions == before.positions).all(axis=1) & (chosen == logits).all(axis=1)
    return TopK(topk.positions, np.where(same[:, None], before.gaps, topk.gaps))


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
    vectors = order[slots].long()
    if clients > 1:
        vectors += torch.arange(0, clients * h, h, device=slots.device).view(-1, 1, 1)
    mixed = functional.embedding_bag(
        vectors.view(-1, k),
        bank.reshape(-1, b),
        per_sample_weights=weights.view(-1, k).to(bank.dtype),
        mode="sum",
    )
    return mixed.view(clients, rows, b)


def stack(arrays: Sequence[Floats], device: torch.device) -> Tensor:
    """The arrays of C clients as one leaf tensor (C, ...); one that several share goes to the device once."""
    moved = {id(array): torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays}
    return torch.stack([moved[id(array)] for array in arrays]).requires_grad_()
