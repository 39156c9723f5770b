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
    others = (*bs, *weights, *biases)
    found: tuple[Tensor, ...] = _Adapted.apply(x, a, scaling, again, *others)  # type: ignore[no-untyped-call]
    return found


class _Adapted(torch.autograd.Function):
    """Every operation counts here: on a small batch a step is as long as what it launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, scaling: float, again: Again | None, *others: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.again, ctx.shape, ctx.dtypes = scaling, again, x.shape, (x.dtype, a.dtype)
        if torch.is_autocast_enabled(x.device.type):
            x, a, *cast = _cast(torch.get_autocast_dtype(x.device.type), x, a, *others)
            others = tuple(cast)
        count = len(others) // 3
        bs, weights, biases = others[:count], others[count : 2 * count], others[2 * count :]
        flat = x.reshape(-1, x.shape[-1])
        inner = _product(a, _of_clients(flat, a).transpose(1, 2))
        if scaling != 1:
            inner *= scaling
        ys = []
        for part, b, weight, bias in zip(_parts(inner, count), bs, weights, biases, strict=True):
            y = _product(part.transpose(1, 2), b, bias).view(len(flat), -1).addmm_(flat, weight.t())
            ys.append(y.view(*ctx.shape[:-1], -1))
        ctx.save_for_backward(flat if again is None else None, inner, a, *bs, *weights)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        flat, inner, a, *others = ctx.saved_tensors
        count = len(gradients)
        bs, weights = others[:count], others[count:]
        if flat is None:
            flat = ctx.again().reshape(-1, ctx.shape[-1]).to(inner.dtype)
        of_ys = [None if of_y is None else of_y.reshape(len(flat), -1) for of_y in gradients]
        of_parts: list[Tensor] = []
        of_bs: list[Tensor | None] = []
        for part, b, of_y in zip(_parts(inner, count), bs, of_ys, strict=True):
            if of_y is None:  # an output that nobody used
                of_parts.append(torch.zeros_like(part))
                of_bs.append(None)
            else:
                own = _of_clients(of_y, a)
                of_parts.append(_product(b, own.transpose(1, 2)))
                of_bs.append(_product(part, own))
        of_inner = of_parts[0] if count == 1 else torch.cat(of_parts, dim=1)
        if ctx.scaling != 1:
            of_inner *= ctx.scaling
        of_a = _product(of_inner, _of_clients(flat, a))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _product(of_inner.transpose(1, 2), a).view(len(flat), -1)
            for of_y, weight in zip(of_ys, weights, strict=True):
                if of_y is not None:
                    of_x.addmm_(of_y, weight)
            of_x = of_x.view(ctx.shape)
        if of_a.dtype != ctx.dtypes[1] or inner.dtype != ctx.dtypes[0]:  # autocast
            of_x, (of_a, *of_bs) = _cast(ctx.dtypes[0], of_x)[0], _cast(ctx.dtypes[1], of_a, *of_bs)
        return of_x, of_a, None, None, *of_bs, *[None] * 2 * count


def _cast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _of_clients(flat: Tensor, a: Tensor) -> Tensor:
    """(C * m, n) as (C, m, n)."""
    return flat.view(len(a), -1, flat.shape[1])


def _parts(inner: Tensor, count: int) -> Sequence[Tensor]:
    """(C, R, m) as each layer's (C, r, m)."""
    return (inner,) if count == 1 else inner.chunk(count, 1)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each client's product, (C, i, j) times (C, j, k), plus bias (k,)."""
    return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)
