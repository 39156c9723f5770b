"""Bases in 4 or 8 bits a weight, through bitsandbytes: how to load them, and to have them dense again."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationMethod

from vblora.errors import ConfigError, ModelError
from vblora.model import find_head
from vblora.weights import keep_unpacked

__all__ = ["dequantized", "is_quantized", "loading_options", "require_few_bits"]

FEW_BITS = ("Linear4bit", "Linear8bitLt")  # classes of bitsandbytes


def loading_options(
    quantize: str, skeleton: nn.Module, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments for `from_pretrained`; none where nothing is to be quantised.

    Linear layers of the trunk are quantised: to NF4 with quantised constants (QLoRA, arXiv 2305.14314), or to
    8 bits by vectors (arXiv 2208.07339). The task head and the output embedding stay as they are.

    Args:
        quantize: none, 4bit or 8bit.
        skeleton: the model without weights, on the meta device.
        device: to load to.
        dtype: of everything that stays, and of products with 4-bit weights.

    Raises:
        ConfigError: bitsandbytes is not installed, or has no such products on this device.
    """
    if quantize == "none":
        return {}
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--quantize {quantize}: {package} is not installed; run pip install 'fed-vblora[quantize]'"
            )
    if quantize == "8bit" and device.type == "cpu" and dtype is torch.float16:
        raise ConfigError(
            "--quantize 8bit: a CPU has no such products with float16; use --dtype bfloat16 or float32"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of casts, layer by layer
    kept = {tensor.name.rpartition(".")[0] for tensor in find_head(skeleton)}
    output = skeleton.get_output_embeddings()  # type: ignore[operator]
    kept |= {name for name, module in skeleton.named_modules() if module is output}
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        llm_int8_skip_modules=sorted(kept),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}, "dtype": dtype}


def is_quantized(model: nn.Module) -> bool:
    """Whether a model was loaded in few bits, by us or because its files are so."""
    return getattr(model, "hf_quantizer", None) is not None


def require_few_bits(quantize: str, model: nn.Module) -> None:
    """See that a model that was asked for in few bits is.

    Raises:
        ConfigError: none of its layers is: transformers replaces plain linear layers, no class of its own
            that a model may have instead (Falcon).
    """
    if quantize != "none" and not _few_bits(model):
        raise ConfigError(
            f"--quantize {quantize}: {type(model).__name__} has no linear layer that bitsandbytes can "
            "replace; use --quantize none"
        )


def _few_bits(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ in FEW_BITS}


def dequantized(model: nn.Module) -> nn.Module:
    """The model with dense layers, of the values that its few bits stand for.

    Raises:
        ModelError: its weights are of a kind that transformers cannot turn back.
    """
    if not is_quantized(model):
        return model
    few = _few_bits(model)
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method == QuantizationMethod.BITS_AND_BYTES and not few:
        return model  # transformers fails where it finds nothing to do
    keep_unpacked(model)
    transposed = [name for name, layer in few.items() if getattr(layer, "source_cls", None) is Conv1D]
    try:
        dense: nn.Module = model.dequantize(dtype=next(model.parameters()).dtype)  # type: ignore[operator]
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"base: its weights are quantised and cannot be had dense ({error}); use --format peft or lora"
        ) from error
    for name in transposed:
        dense.set_submodule(name, _conv1d(dense.get_submodule(name)))
    return dense


def _conv1d(layer: Any) -> nn.Module:
    """GPT-2's own layer, which its files hold, of the linear layer that transformers makes of its bits."""
    conv = Conv1D(layer.out_features, layer.in_features)  # type: ignore[no-untyped-call]
    conv.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    conv.bias = layer.bias
    return conv
