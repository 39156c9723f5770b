"""Gradients of one step: compose, pass the batch through the base and back, and back through the composing.

The base is passed with leaves of its own, the composed rows and the head, so that a batch can be cut into
pieces, and a pass captured as a CUDA graph, whatever the rows are composed of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_client.batches import Batch
from fl_client.graphs import Graphs
from fl_client.tasks import Task
from vblora.model import AdaptedModel

__all__ = ["Passes"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Passes:
    """Gradients for one model and task.

    Attributes:
        model: the base with the adapter in place; its binding is used and released.
        task: gives the losses.
        graphs: captured passes, where they are replayed; None passes eagerly.
    """

    model: AdaptedModel
    task: Task
    graphs: Graphs | None = None

    def gradients(
        self,
        tensors: Mapping[str, Tensor],
        trained: Mapping[str, Tensor],
        pieces: Sequence[Batch],
        clients: int,
    ) -> tuple[Tensor, Tensors]:
        """(C,) losses, detached, and gradients of the tensors that are trained.

        A client's loss depends on its own tensors alone. A batch may come in pieces: losses and gradients are
        those of the whole.

        Args:
            tensors: of `model.load`.
            trained: those of them that want a gradient.
            pieces: the batch of C clients, or its parts.
            clients: C.
        """
        composed = self.model.compose(tensors)
        wanted = [name for name in composed if any((key == "head") == (name == "head") for key in trained)]
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in composed.items()}
        shared = self._shared(pieces, clients)
        parts = [self._passed(leaves, batch, share, clients) for batch, share in shared]
        losses, of_leaves = parts[0]
        for more, of_more in parts[1:]:
            losses = losses + more
            of_leaves = {name: of_leaves[name] + of_more[name] for name in wanted}
        found = torch.autograd.grad(
            [composed[name] for name in wanted], list(trained.values()), [of_leaves[name] for name in wanted]
        )
        return losses, dict(zip(trained, found, strict=True))

    def _shared(self, pieces: Sequence[Batch], clients: int) -> list[tuple[Batch, Tensor | None]]:
        """Pieces with the share (C,) of a client's targets that each has: a loss is a mean over targets."""
        if len(pieces) == 1:
            return [(pieces[0], None)]
        counts = torch.stack([self.task.counts(batch, clients) for batch in pieces])
        return list(zip(pieces, counts / counts.sum(dim=0).clamp(min=1), strict=True))

    def _passed(
        self, leaves: Tensors, batch: Batch, share: Tensor | None, clients: int
    ) -> tuple[Tensor, Tensors]:
        if self.graphs is not None:
            return self.graphs.run(self._pass, leaves, batch, share, clients)
        return self._pass(leaves, batch, share, clients)

    def _pass(
        self, leaves: Tensors, batch: Batch, share: Tensor | None, clients: int
    ) -> tuple[Tensor, Tensors]:
        """Losses (C,) times their shares, and gradients of the leaves that want one."""
        self.model.attach(leaves)
        try:
            losses = self.task.losses(self.model(**batch.inputs).logits, batch, clients)
            if share is not None:
                losses = losses * share
            wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            found = torch.autograd.grad(losses.sum(), list(wanted.values()))
        finally:
            self.model.unbind()
        return losses.detach(), dict(zip(wanted, found, strict=True))
