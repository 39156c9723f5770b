"""The dense weight of a frozen layer, however the base holds it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["dense_weight"]


def dense_weight(layer: nn.Module) -> Tensor:
    """W (out, in) of a linear layer, in its own dtype. GPT-2's Conv1D holds it transposed."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator,union-attr]
    return weight if isinstance(layer, nn.Linear) else weight.T
