"""Passes captured as CUDA graphs: a small batch is bound by the launches of its kernels, a replay is one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fl_client.batches import Batch

__all__ = ["Graphs"]

LENGTHS = 32  # texts are padded to a multiple of it: few shapes of batch, so few graphs
MOST = 16  # graphs held; each has its memory

Tensors = dict[str, Tensor]
Pass = Callable[[Tensors, Batch, Tensor | None, int], tuple[Tensor, Tensors]]


@dataclass
class Captured:
    """One graph, what it reads and what it writes. Batches of one shape differ in their values alone."""

    graph: torch.cuda.CUDAGraph
    leaves: Tensors
    batch: list[Tensor]
    share: Tensor | None
    losses: Tensor
    gradients: Tensors


@dataclass
class Graphs:
    """Captured passes by the shapes that they were given; the one used longest ago makes room for another.

    The first call with a shape runs eagerly, to make what must exist, and captures; what it gives is a
    replay's already, so that a step gives the same bits whenever it is taken.

    Attributes:
        longest: tokens that the model has positions for; None where it sets no limit.
    """

    longest: int | None = None
    _held: OrderedDict[Any, Captured] = field(default_factory=OrderedDict)

    def length(self, tokens: int) -> int:
        """How long texts of so many tokens are padded."""
        padded = LENGTHS * -(-tokens // LENGTHS)
        return padded if self.longest is None else max(tokens, min(padded, self.longest))

    def run(
        self, work: Pass, leaves: Tensors, batch: Batch, share: Tensor | None, clients: int
    ) -> tuple[Tensor, Tensors]:
        """What `work` gives, in tensors of the caller's own.

        Args:
            work: losses (C,) and gradients of the leaves that want one.
            leaves: by name.
            batch: of C clients.
            share: (C,) or None.
            clients: C.
        """
        given = _tensors(batch)
        key: tuple[object, ...] = tuple((*leaf.shape, leaf.requires_grad) for leaf in leaves.values())
        key += (*(tensor.shape for tensor in given), share is None, clients)
        if key not in self._held:
            if len(self._held) == MOST:
                self._held.popitem(last=False)
            self._held[key] = _capture(work, leaves, batch, share, clients)
        self._held.move_to_end(key)
        held = self._held[key]
        with torch.no_grad():
            for name, leaf in leaves.items():
                held.leaves[name].copy_(leaf)
            for kept, tensor in zip(held.batch, given, strict=True):
                kept.copy_(tensor)
            if share is not None and held.share is not None:
                held.share.copy_(share)
        held.graph.replay()
        return held.losses.clone(), {name: found.clone() for name, found in held.gradients.items()}


def _capture(work: Pass, leaves: Tensors, batch: Batch, share: Tensor | None, clients: int) -> Captured:
    own = {name: leaf.detach().clone().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    held = Batch(*(tensor.clone() for tensor in _tensors(batch)))
    share = None if share is None else share.clone()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(own, held, share, clients)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, gradients = work(own, held, share, clients)
    return Captured(graph, own, _tensors(held), share, losses, gradients)


def _tensors(batch: Batch) -> list[Tensor]:
    found = [getattr(batch, entry.name) for entry in fields(batch)]
    return [tensor for tensor in found if tensor is not None]
