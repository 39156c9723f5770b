"""Root mean square norms of a base in one kernel.

As transformers writes them they take eight, some twenty back, and keep a float32 copy of their input: an
eighth of the training step of a 7B model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["fuse_norms"]


def fuse_norms(base: nn.Module) -> list[str]:
    """Let PyTorch's own `rms_norm` stand for every norm of the base that it equals; that is tried out.

    It rounds once where a module rounds twice, so outputs in 16 bits differ in their last bit. On a CPU,
    PyTorch's is made of the same operations: there is nothing to gain.

    Returns:
        Names of the norms.
    """
    found: dict[str, Any] = {name: module for name, module in base.named_modules() if _is_plain(module)}
    for norm in found.values():
        norm.forward = partial(_fused, norm.forward, norm.weight, _epsilon(norm))
    return list(found)


def _fused(forward: Any, weight: Tensor, epsilon: float | None, x: Tensor) -> Tensor:
    if x.dtype is not weight.dtype:  # by a rule of each module's own
        return forward(x)  # type: ignore[no-any-return]
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def _epsilon(module: nn.Module) -> float | None:
    """Of a module whose one parameter is a weight along the last axis; None of any other."""
    names = [name for name, _ in module.named_parameters()]
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    plain = names == ["weight"] and module.weight.dim() == 1  # type: ignore[operator]
    return epsilon if plain and isinstance(epsilon, float) and not isinstance(module, nn.RMSNorm) else None


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    epsilon = _epsilon(module)
    if epsilon is None:
        return False
    weight: Any = module.weight
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=torch.float64).sin()
    x = x.float().view(1, 2, -1)
    expected = functional.rms_norm(x, (len(weight),), weight.float(), epsilon)
    try:
        found = module(x)
    except (TypeError, RuntimeError):  # takes something else
        return False
    return isinstance(found, Tensor) and torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-5)
