"""`y_i = W_i x + s B_i A_i x` for frozen layers that read one x, in a single node of autograd.

The factors A_i lie end to end, so one product with x serves all layers, and so does one for the gradient of
A. The low-rank part of each y is written first, and the product with W adds to it where it stands; likewise
the gradient of x, which all layers add to in turn. Nothing is copied, and nothing is added afterwards.

Axes: C clients, m rows of each; x (C * m, in), A of all layers (C, R, in), B_i transposed (C, r, out_i). The
products A x are held as (C, R, m): rows of a batch are many and aligned in memory, ranks are neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["adapted"]

Again = Callable[[], Tensor]


def adapted(
    x: Tensor,
    a: Tensor,
    bs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scaling: float,
    again: Again | None = None,
) -> tuple[Tensor, ...]:
    """Outputs of the n layers; their weights and biases get no gradient.

    Args:
        x: (C * m, ..., in).
        a: (C, R, in) with R = n r.
        bs: n of (C, r, out_i).
        weights, biases: n of (out_i, in) and (out_i,) or None.
        scaling: s.
        again: makes x anew in the backward pass, so that it need not be kept.
    """
    found: tuple[Tensor, ...] = _Adapted.apply(  # type: ignore[no-untyped-call]
        x, a, tuple(weights), tuple(biases), scaling, again, *bs
    )
    return found


class _Adapted(torch.autograd.Function):
    """Every operation counts here, views too: on a small batch a step is as long as what it launches."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        scaling: float,
        again: Again | None,
        *bs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.again, ctx.dtypes = scaling, again, (x.dtype, a.dtype)
        ctx.shape = shape = x.shape
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            (x, a), bs = _cast(dtype, x, a), _cast(dtype, *bs)
            weights, biases = _cast(dtype, *weights), _cast(dtype, *biases)
        clients = a.shape[0]
        flat = x.reshape(-1, shape[-1])
        inner = torch.bmm(a, flat.view(clients, -1, shape[-1]).transpose(1, 2))
        if scaling != 1:
            inner *= scaling
        ys = []
        for part, b, weight, bias in zip(_parts(inner, len(bs)), bs, weights, biases, strict=True):
            part = part.transpose(1, 2)
            y = torch.bmm(part, b) if bias is None else torch.baddbmm(bias, part, b)
            y.view(-1, b.shape[2]).addmm_(flat, weight.t())
            ys.append(y.view(*shape[:-1], -1))
        ctx.weights = weights
        ctx.save_for_backward(flat if again is None else None, inner, a, *bs)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        flat, inner, a, *bs = ctx.saved_tensors
        clients, shape = a.shape[0], ctx.shape
        if flat is None:
            flat = ctx.again().reshape(-1, shape[-1]).to(inner.dtype)
        of_ys, of_parts, of_bs = [], [], []
        for part, b, of_y in zip(_parts(inner, len(bs)), bs, gradients, strict=True):
            if of_y is None:  # an output that nobody used
                own, of_part, of_b = None, torch.zeros_like(part), None
            else:
                own = of_y.reshape(clients, -1, b.shape[2])
                of_part, of_b = torch.bmm(b, own.transpose(1, 2)), torch.bmm(part, own)
            of_ys.append(own)
            of_parts.append(of_part)
            of_bs.append(of_b)
        of_inner = of_parts[0] if len(bs) == 1 else torch.cat(of_parts, dim=1)
        if ctx.scaling != 1:
            of_inner *= ctx.scaling
        of_a = torch.bmm(of_inner, flat.view(clients, -1, shape[-1]))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(of_inner.transpose(1, 2), a)
            rows = of_x.view(-1, shape[-1])
            for own, weight in zip(of_ys, ctx.weights, strict=True):
                if own is not None:
                    rows.addmm_(own.view(-1, own.shape[2]), weight)
            of_x = of_x.view(shape)
        if ctx.dtypes != (inner.dtype, a.dtype):  # autocast
            (of_x,), (of_a, *of_bs) = _cast(ctx.dtypes[0], of_x), _cast(ctx.dtypes[1], of_a, *of_bs)
        return of_x, of_a, None, None, None, None, *of_bs


def _cast(dtype: torch.dtype, *tensors: Any) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _parts(inner: Tensor, count: int) -> Sequence[Tensor]:
    """(C, R, m) as each layer's (C, r, m)."""
    return (inner,) if count == 1 else inner.chunk(count, 1)
