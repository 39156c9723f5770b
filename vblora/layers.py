"""The two layers that an adapted model is made of. They own no parameters: factors are bound before use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AdaptedLinear", "HeadLinear"]


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus the low-rank path of C clients: `y = W x + s B A x`.

    The input's first axis holds the clients' batches one after another, (C * n, ..., in); each client's part
    meets its own factors. Without bound factors it is the frozen layer.

    Attributes:
        base: the frozen layer, any module from (..., in) to (..., out).
        scaling: s, 1 for VB-LoRA.
        factors: A (C, r, in) and B transposed (C, r, out), in the base's compute dtype.
    """

    def __init__(self, base: nn.Module, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.factors: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.factors is None:
            return y
        a, b = self.factors
        clients, out = len(a), y.shape[-1]
        if clients == 1:
            inner = functional.linear(x.reshape(-1, x.shape[-1]), a[0])
            return torch.addmm(y.view(-1, out), inner, b[0], alpha=self.scaling).view(y.shape)
        inner = torch.bmm(x.reshape(clients, -1, x.shape[-1]), a.transpose(1, 2))
        return torch.baddbmm(y.view(clients, -1, out), inner, b, alpha=self.scaling).view(y.shape)


class HeadLinear(nn.Module):
    """A linear layer of the task head with its own weights for each of C clients.

    Attributes:
        base: the layer it stands for; its shapes are used, its values are not.
        tensors: weight (C, out, in) and bias (C, out) or None.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.tensors: tuple[Tensor, Tensor | None] | None = None

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.tensors is None:
            y: Tensor = self.base(x)
            return y
        weight, bias = self.tensors
        clients = len(weight)
        if clients == 1:
            return functional.linear(x, weight[0], None if bias is None else bias[0])
        y = torch.bmm(x.reshape(clients, -1, x.shape[-1]), weight.transpose(1, 2))
        if bias is not None:
            y = y + bias.unsqueeze(1)
        return y.view(*x.shape[:-1], weight.shape[1])
