"""How to make a layer's input anew from what autograd keeps for the base.

The gradient of A needs the layer's input x, which a frozen layer does not keep. Often x comes out of a norm
or of an activation, and what it was made from is kept anyway, for the gradients of those: then x can be had
again for a few elementwise operations, to the same bits (a layer norm's to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["maker"]

Maker = Callable[[], Tensor]


def maker(x: Tensor) -> Maker | None:
    """Makes x anew, if called before its own gradient is computed; None where it has to be kept.

    A compiler decides by itself what it keeps. Under activation checkpointing nothing is kept, and what is
    brought back may be read once.
    """
    if torch.compiler.is_compiling() or x.grad_fn is None or _is_checkpointed():
        return None
    return _of(x.grad_fn)


def _is_checkpointed() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def _of(node: Any) -> Maker | None:
    """What makes a node's output; names and saved tensors are those of PyTorch's formulas."""
    make = KINDS.get(node.name())
    return make(node) if make else None


def _product(node: Any) -> Maker | None:
    """self * other. Each is kept where the other wants a gradient; else it is made in turn."""
    own, other = (edge[0] for edge in node.next_functions)
    make_own = _read(node, "_saved_self") if other is not None else _of(own)
    make_other = _read(node, "_saved_other") if own is not None else _of(other)
    if make_own is None or make_other is None:
        return None
    return lambda: make_own() * make_other()


def _copy(node: Any) -> Maker | None:
    """Another type."""
    make = _of(node.next_functions[0][0])
    dtype = node._input_metadata[0].dtype
    return None if make is None else lambda: make().to(dtype)


def _silu(node: Any) -> Maker:
    return lambda: functional.silu(node._saved_self)


def _gelu(node: Any) -> Maker:
    return lambda: functional.gelu(node._saved_self, approximate=node._saved_approximate)


def _layer_norm(node: Any) -> Maker:
    def make() -> Tensor:
        x: Tensor = node._saved_input
        mean, deviation = node._saved_result1, node._saved_result2
        weight, bias = node._saved_weight, node._saved_bias
        normal: Tensor = (x.to(mean.dtype) - mean) * deviation
        if weight is not None:
            normal *= weight
        if bias is not None:
            normal += bias
        return normal.to(x.dtype)

    return make


def _rms_norm(node: Any) -> Maker:
    def make() -> Tensor:
        x: Tensor = node._saved_input
        normal, weight = x * node._saved_result1, node._saved_weight  # its reciprocal deviation is in float32
        return normal.to(x.dtype) if weight is None else torch.mul(normal, weight, out=torch.empty_like(x))

    return make


def _read(node: Any, name: str) -> Maker:
    return lambda: getattr(node, name)


KINDS: dict[str, Callable[[Any], Maker | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _copy,
    "SiluBackward0": _silu,
    "GeluBackward0": _gelu,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
}
