"""The dense weight of a frozen layer, however the base holds it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["dense_weight", "keep_unpacked", "set_dense_weight"]


def dense_weight(layer: nn.Module) -> Tensor:
    """W (out, in) of a linear layer: as it is, or what the few bits of a bitsandbytes layer stand for.

    GPT-2's Conv1D holds it transposed.
    """
    holder: Any = layer
    weight = holder.weight
    dense: Tensor
    match type(weight).__name__:
        case "Params4bit":
            from bitsandbytes.functional import dequantize_4bit

            dense = dequantize_4bit(weight.data, weight.quant_state)
        case "Int8Params":
            from bitsandbytes.functional import int8_vectorwise_dequant

            scales = weight.SCB if weight.SCB is not None else holder.state.SCB
            dense = int8_vectorwise_dequant(weight.data, scales)
        case _:
            dense = weight.detach() if isinstance(layer, nn.Linear) else weight.detach().T
    return dense


def keep_unpacked(base: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights as they are.

    On some CPUs it packs them anew at the first forward in evaluation mode, and products of packed weights
    have no gradient: what is trained after an evaluation would miss all that comes through the base.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            if layer.weight.device.type == "cpu":
                layer.weight.cpu()  # unpacks in place what was packed before


def set_dense_weight(base: nn.Module, name: str, weight: Tensor) -> None:
    """Give the layer `name` of a dense model another W (out, in)."""
    layer = base.get_submodule(name)
    layer.weight.data.copy_(weight if isinstance(layer, nn.Linear) else weight.T)  # type: ignore[operator]
