"""Training as PEFT does it, all h logits of every row live: what compacted logits must equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vblora import seeded
from vblora.anchors import anchored
from vblora.candidates import Candidates
from vblora.rows import mix
from vblora.spec import Blueprint, VBLoRASpec
from vblora.state import State, TopK


def seeded_table(spec: VBLoRASpec, rows: int) -> tuple[Tensor, Tensor]:
    """(S, h) bank vectors and logits of every place."""
    everything, h = np.arange(rows), spec.num_vectors
    order = seeded.order(spec.seed, everything, h, h)
    return torch.from_numpy(order), torch.from_numpy(
        seeded.values(spec.seed, everything, h, h, spec.init_std)
    )


def start_logits(spec: VBLoRASpec, seeds: Tensor, topk: TopK) -> Tensor:
    """(S, h) logits that stand for a selection."""
    chosen = torch.from_numpy(anchored(spec, seeds.numpy(), topk))
    return seeds.scatter(1, torch.from_numpy(topk.positions.astype(np.int64)), chosen)


def largest(logits: Tensor, k: int) -> Tensor:
    """(..., k) places of the k largest, ties to the lower place: by a stable sort."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def unfold(candidates: Candidates, flat: Tensor, seeds: Tensor) -> Tensor:
    """(S, h) from the flat compacted logits (N,): what is not held is seeded."""
    width = candidates.width
    full = seeds.to(flat.dtype).clone()
    full[:, :width] = flat[: len(full) * width].view(-1, width)
    for tier in candidates._tiers:
        full[tier.rows, : tier.slots.shape[1]] = flat[tier.slots]
    return full


@dataclass
class DenseRows:
    """A row source that holds logits (C, S * h), laid in each row's seeded order."""

    blueprint: Blueprint
    places: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec = self.blueprint.spec
        assert isinstance(spec, VBLoRASpec)
        self.spec = spec
        self.order, self.seeds = seeded_table(spec, self.blueprint.rows)

    def load(self, *states: State) -> dict[str, Tensor]:
        selections = [state.topk for state in states if state.topk is not None]
        logits = torch.stack([start_logits(self.spec, self.seeds, topk).flatten() for topk in selections])
        bank = torch.from_numpy(np.stack([state.dense["bank"] for state in states]))
        return {"bank": bank.requires_grad_(), "logits": logits.requires_grad_()}

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        logits = tensors["logits"]
        held = logits.detach().view(len(logits), self.blueprint.rows, -1)
        best = held.topk(min(self.spec.topk + 1, self.spec.num_vectors)).values
        assert (best.diff() < 0).all(), "a tie: the reference itself would be ambiguous"
        places = held.topk(self.spec.topk).indices
        self.places.append(places)
        slots = places + torch.arange(0, held.shape[1] * held.shape[2], held.shape[2]).view(-1, 1)
        return mix(tensors["bank"], logits, slots, self.order.flatten())

    def growth(self) -> dict[str, Tensor]:
        return {}

    def selections(self, tensors: Mapping[str, Tensor]) -> list[TopK | None]:
        raise NotImplementedError
