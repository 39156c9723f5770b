"""The two layers that an adapted model is made of. They own no parameters: factors are bound before use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
        base = self.base
        if self.factors is None:
            y: Tensor = base(x)
            return y
        if type(base) is nn.Linear and not base.weight.requires_grad:
            return _adapted(x, *self.factors, base.weight, base.bias, self.scaling)
        a, b = self.factors
        flat = base(x).reshape(len(a), -1, b.shape[-1])
        inner = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.transpose(1, 2))
        return torch.baddbmm(flat, inner, b, alpha=self.scaling).view(*x.shape[:-1], b.shape[-1])


class _Adapted(torch.autograd.Function):
    """`W x + s B A x` over a frozen W in one node: the low-rank paths are added in place, both ways.

    As plain operations it would take half a dozen nodes, a copy of y, and one more gradient of x to add.
    Axes: C clients, m rows of each; x (C * m, in), a (C, r, in), b (C, r, out).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        clients = len(a)
        y = functional.linear(x, weight, bias)
        inner = torch.bmm(x.view(clients, -1, x.shape[-1]), a.transpose(1, 2))
        if scaling != 1:
            inner *= scaling
        y.view(clients, -1, y.shape[-1]).baddbmm_(inner, b)
        ctx.save_for_backward(x, a, b, weight, inner)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        x, a, b, weight, inner = ctx.saved_tensors
        clients = len(a)
        of_y = gradient.reshape(clients, -1, gradient.shape[-1])
        of_inner = torch.bmm(of_y, b.transpose(1, 2))
        if ctx.scaling != 1:
            of_inner *= ctx.scaling
        of_b = torch.bmm(inner.transpose(1, 2), of_y)
        of_a = torch.bmm(of_inner.transpose(1, 2), x.view(clients, -1, x.shape[-1]))
        if not ctx.needs_input_grad[0]:
            return None, of_a, of_b, None, None, None
        of_x = gradient.reshape(len(x), -1) @ weight
        of_x.view(clients, -1, x.shape[-1]).baddbmm_(of_inner, a)
        return of_x, of_a, of_b, None, None, None


def _adapted(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """`_Adapted` for x of any shape (C * n, ..., in)."""
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Adapted.apply(flat, a, b, weight, bias, scaling)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


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
