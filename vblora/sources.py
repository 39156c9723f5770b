"""The row sources beside VB-LoRA's: rows that dense tensors alone make, one function a kind.

Axes: C clients, S rows, b row length, r rank, L linear layers, T pieces (r, b) of all A, d length of theta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vblora import seeded
from vblora.rows import MixedRows, RowSource, Tensors, mix, stack
from vblora.spec import BankOnlySpec, Blueprint, FFALoRASpec, LoRASpec, LoRAXSSpec, UniLoRASpec, VBLoRASpec
from vblora.start import order_of
from vblora.state import State, TopK, lora_rows, theta_places

__all__ = ["DenseRows", "row_source", "singular_factors"]

Compose = Callable[[Mapping[str, Tensor]], Tensor]
Weights = Callable[[str], Tensor]

SPARE = 16  # directions carried beyond twice the rank while singular vectors are sought
PASSES = 10  # over a weight, as the authors of LoRA-XS take


@dataclass(frozen=True)
class DenseRows:
    """A row source without a selection.

    Attributes:
        device: of the tensors.
        compose: makes the rows (C, S, b) from the adapter's own tensors (C, ...).
    """

    device: torch.device
    compose: Compose

    def load(self, *states: State) -> Tensors:
        names = [name for name in states[0].dense if name != "head"]
        return {name: stack([state.dense[name] for state in states], self.device) for name in names}

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.compose(tensors)

    def growth(self) -> dict[str, Tensor]:
        return {}

    def selections(self, tensors: Mapping[str, Tensor]) -> list[TopK | None]:
        return [None] * len(next(iter(tensors.values())))


def row_source(blueprint: Blueprint, device: torch.device, weights: Weights) -> RowSource:
    """The source that a blueprint's adapter trains.

    Args:
        blueprint: of the adapter.
        device: of its tensors.
        weights: gives the frozen weight (out, in) of a layer by its name; LoRA-XS asks for them.
    """
    spec = blueprint.spec
    match spec:
        case VBLoRASpec():
            return MixedRows(blueprint, device)
        case BankOnlySpec():
            compose = _fixed_mixtures(spec, blueprint, device)
        case LoRASpec():
            compose = _free
        case FFALoRASpec():
            compose = _frozen_a(blueprint, device)
        case LoRAXSSpec():
            compose = _cored(spec, blueprint, device, weights)
        case UniLoRASpec():
            compose = _shared_entries(spec, blueprint, device)
    return DenseRows(device, compose)


def _free(tensors: Mapping[str, Tensor]) -> Tensor:
    """LoRA: the rows themselves are trained, `rows` (C, S, b)."""
    return tensors["rows"]


def _frozen_a(blueprint: Blueprint, device: torch.device) -> Compose:
    """FFA-LoRA: `rows` (C, S_B, b) are B's, between the rows of A that the seed gave."""
    frozen = torch.from_numpy(lora_rows(blueprint)).to(device)
    places = torch.tensor(blueprint.b_rows, device=device)

    def compose(tensors: Mapping[str, Tensor]) -> Tensor:
        rows = tensors["rows"]
        return frozen.to(rows.dtype).expand(len(rows), -1, -1).index_copy(1, places, rows)

    return compose


def _fixed_mixtures(spec: BankOnlySpec, blueprint: Blueprint, device: torch.device) -> Compose:
    """Bank-only: `bank` (C, h, b), mixed by the k logits of each row that come first at version 0."""
    rows, k, order = blueprint.rows, spec.topk, order_of(blueprint)
    vectors = torch.from_numpy(order.vectors(np.arange(rows), k)).flatten().to(device)
    chosen = torch.from_numpy(order.logits(np.arange(rows), k)).to(device)
    slots = torch.arange(rows * k, device=device).view(1, rows, k)

    def compose(tensors: Mapping[str, Tensor]) -> Tensor:
        bank = tensors["bank"]
        clients = len(bank)
        held = chosen.to(bank.dtype).view(1, -1).expand(clients, -1)
        return mix(bank, held, slots.expand(clients, -1, -1), vectors)

    return compose


def _shared_entries(spec: UniLoRASpec, blueprint: Blueprint, device: torch.device) -> Compose:
    """Uni-LoRA: every entry reads `theta` (C, d) at its place, over the root of how many read there."""
    drawn, of_place = theta_places(spec, blueprint)
    places, scales = torch.from_numpy(drawn).to(device), torch.from_numpy(of_place).to(device)

    def compose(tensors: Mapping[str, Tensor]) -> Tensor:
        theta = tensors["theta"]
        return (theta * scales.to(theta.dtype))[:, places]

    return compose


def _cored(spec: LoRAXSSpec, blueprint: Blueprint, device: torch.device, weights: Weights) -> Compose:
    """LoRA-XS: `cores` (C, L, r, r) between the frozen factors: A of a layer becomes R A, B stays."""
    r, length = spec.rank, blueprint.vector_length
    pieces, rest, owners, places = [], [], [], []
    for number, part in enumerate(blueprint.slices):
        a, b = singular_factors(weights(part.linear.name), r)
        pieces.append(a.view(r, -1, length).transpose(0, 1))  # column block after column block
        rest.append(b.view(-1, length))
        count = len(pieces[-1])
        owners.append(np.full(count, number))
        places.append(part.start + np.arange(r * count).reshape(r, count).T.ravel())
    places.append(np.array(blueprint.b_rows))
    of_a, of_b = torch.cat(pieces).to(device), torch.cat(rest).to(device)
    owner = torch.from_numpy(np.concatenate(owners)).to(device)
    order = torch.from_numpy(np.argsort(np.concatenate(places))).to(device)

    def compose(tensors: Mapping[str, Tensor]) -> Tensor:
        cores = tensors["cores"]
        made = torch.matmul(cores[:, owner], of_a.to(cores.dtype)).flatten(1, 2)
        still = of_b.to(cores.dtype).expand(len(cores), -1, -1)
        return torch.cat([made, still], dim=1)[:, order]

    return compose


def singular_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular factors of W (out, in): A = S V^T (r, in) and B^T = U^T (r, out), float32.

    By subspace iteration in float64 from a fixed start, so that every site finds the same up to rounding,
    signs too: each v has a positive product with the start's first vector. Exact where the shorter side is at
    most twice the rank and a little, else as near as a randomised SVD comes.
    """
    matrix = weight.double()
    side, width = matrix.shape[1], min(*matrix.shape, 2 * rank + SPARE)
    drawn: NDArray[np.float32] = seeded.uniform(0, "probe", 0, width * side, 1.0)
    start = torch.from_numpy(drawn).to(matrix).view(width, side)
    spanned = torch.linalg.qr(matrix @ start.T).Q
    for _ in range(PASSES):
        spanned = torch.linalg.qr(matrix @ (matrix.T @ spanned)).Q
    u, s, vh = torch.linalg.svd(spanned.T @ matrix, full_matrices=False)
    u, s, vh = (spanned @ u)[:, :rank], s[:rank], vh[:rank]
    signs = torch.where(vh @ start[0] < 0, -1.0, 1.0).to(s)
    return ((signs * s).unsqueeze(1) * vh).float(), (u * signs).T.contiguous().float()
