"""Cut the rows of an adapter into the factors of its layers, and put their gradients together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vblora.spec import Blueprint

__all__ = ["Cutter", "Factors"]

# Of layers that share an input: A of all end to end (C, R, in), and each B transposed (C, r, out).
Factors = tuple[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Piece:
    """Consecutive rows that make one factor: lines of `width` numbers, of which the first `side` count.

    `start` is the place of its first number among a client's.
    """

    start: int
    height: int
    width: int
    side: int


class Cutter:
    """Knows where each factor's rows lie. The rows of layers that share an input are brought together.

    Args:
        blueprint: gives the rows of each layer.
        groups: of places in `blueprint.linears`; each place once.
        device: of the rows.
    """

    def __init__(self, blueprint: Blueprint, groups: Sequence[Sequence[int]], device: torch.device) -> None:
        self._sizes = [len(group) for group in groups]
        rank, slices = blueprint.spec.rank, blueprint.slices
        order: list[NDArray[np.int64]] = []
        pieces: list[Piece] = []

        def add(rows: Sequence[NDArray[np.int64]], side: int) -> None:
            last = pieces[-1] if pieces else Piece(0, 0, 0, 0)
            height = rank * len(rows)
            width = sum(map(len, rows)) // height * blueprint.vector_length
            pieces.append(Piece(last.start + last.height * last.width, height, width, side))
            order.extend(rows)

        for group in groups:
            parts = [slices[place] for place in group]
            add([np.arange(part.start, part.middle) for part in parts], parts[0].linear.in_features)
            for part in parts:
                add([np.arange(part.middle, part.stop)], part.linear.out_features)
        self.pieces = tuple(pieces)
        places = np.concatenate(order)
        kept = np.array_equal(places, np.arange(len(places)))
        self.order = None if kept else torch.from_numpy(places).to(device)
        self.inverse = None if kept else torch.from_numpy(np.argsort(places)).to(device)

    def cut(self, rows: Tensor, dtype: torch.dtype) -> list[Factors]:
        """Factors of each group from rows (C, S, b), in `dtype`; differentiable."""
        found = iter(_Cut.apply(rows, self, dtype))  # type: ignore[no-untyped-call]
        return [(next(found), tuple(next(found) for _ in range(size))) for size in self._sizes]


class _Cut(torch.autograd.Function):
    """As views and slices, each factor would be some nodes of its own, both ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cutter: Cutter, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ctx.cutter, ctx.shape, ctx.dtype = cutter, rows.shape, rows.dtype
        ctx.set_materialize_grads(False)
        rows = rows.to(dtype)
        rows = rows.contiguous() if cutter.order is None else rows.index_select(1, cutter.order)
        clients, step, begin = len(rows), rows.stride(0), rows.storage_offset()
        return tuple(
            rows.as_strided((clients, p.height, p.side), (step, p.width, 1), begin + p.start)
            for p in cutter.pieces
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        cutter, (clients, _, length) = ctx.cutter, ctx.shape
        parts = []
        like = next(gradient for gradient in gradients if gradient is not None)
        for gradient, piece in zip(gradients, cutter.pieces, strict=True):
            if gradient is None:  # a layer that took no part
                gradient = like.new_zeros(clients, piece.height, piece.width)
            elif piece.side < piece.width:
                gradient = functional.pad(gradient, (0, piece.width - piece.side))
            parts.append(gradient.reshape(clients, -1, length))
        together = torch.cat(parts, dim=1)
        if cutter.inverse is not None:
            together = together.index_select(1, cutter.inverse)
        return together.to(ctx.dtype), None, None
