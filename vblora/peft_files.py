"""PEFT's files: write an adapter that `PeftModel.from_pretrained` loads.

PEFT keeps logits dense, (r, in/b, h) for A and (out/b, r, h) for B, in the bank's own order; `form="topk"`
keeps the k indices and k - 1 weights instead, from which PEFT can predict but not train on. Our rows of B are
stored transposed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vblora import seeded
from vblora.anchors import anchored
from vblora.errors import ExportError
from vblora.files import safetensors_bytes, write_atomic
from vblora.spec import Blueprint, RowSlice, VBLoRASpec
from vblora.state import State, mixture_weights

__all__ = ["dense_logits", "export_peft"]

PREFIX = "base_model.model."
CONV1D_MODELS = ("gpt2-", "openai-gpt-")  # their weights are stored transposed; PEFT warns unless told
Arrays = dict[str, NDArray[Any]]


def export_peft(
    state: State, blueprint: Blueprint, directory: Path, *, base: str, form: Literal["full", "topk"] = "full"
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        state: the adapter.
        blueprint: what it means.
        directory: made where it is missing.
        base: name or path of the base model, for the config.
        form: "full" dense logits, or "topk". LoRA has one form.

    Raises:
        ExportError: rows are cut, which PEFT's format cannot say.
    """
    spec = blueprint.spec
    if isinstance(spec, VBLoRASpec):
        if blueprint.cut_rows:
            raise ExportError(
                f"format peft: {blueprint.cut_rows} rows are cut because vector-length {spec.vector_length} "
                "does not divide every layer's sides, and PEFT's format cannot say that; "
                "train with a vector length that divides"
            )
        tensors = _full_logits(state, blueprint) if form == "full" else _topk_logits(state, blueprint)
        tensors["base_model.vblora_vector_bank"] = state.dense["bank"]
        config = _vblora_config(spec, topk_only=form == "topk")
    else:
        tensors = _lora_factors(state, blueprint)
        config = {"peft_type": "LORA", "lora_alpha": spec.alpha, "lora_dropout": 0.0, "bias": "none"}
    tensors |= _head(state, blueprint)
    config |= {
        "r": spec.rank,
        "base_model_name_or_path": base,
        "target_modules": [linear.name for linear in blueprint.linears],
        "task_type": "SEQ_CLS" if blueprint.labels else "CAUSAL_LM",
        "modules_to_save": sorted({name.rsplit(".", 1)[0].split(".")[0] for name in _head_names(blueprint)})
        or None,
        "fan_in_fan_out": blueprint.model.startswith(CONV1D_MODELS),
        "inference_mode": True,
    }
    write_atomic(directory / "adapter_model.safetensors", safetensors_bytes(tensors, {"format": "pt"}))
    write_atomic(directory / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def dense_logits(state: State, blueprint: Blueprint) -> NDArray[np.float32]:
    """All logits of a state in the bank's order, (S, h): for export and for tests, never for training."""
    spec = blueprint.spec
    if not isinstance(spec, VBLoRASpec) or state.topk is None:
        raise ExportError(f"adapter {spec.kind} has no logits")
    rows = np.arange(blueprint.rows)
    order = seeded.order(spec.seed, rows, spec.num_vectors, spec.num_vectors)
    values = seeded.values(spec.seed, rows, spec.num_vectors, spec.num_vectors, spec.init_std)
    np.put_along_axis(
        values, state.topk.positions.astype(np.int64), anchored(spec, values, state.topk), axis=1
    )
    logits = np.empty_like(values)
    np.put_along_axis(logits, order.astype(np.int64), values, axis=1)
    return logits


def _vblora_config(spec: VBLoRASpec, topk_only: bool) -> dict[str, Any]:
    return {
        "peft_type": "VBLORA",
        "num_vectors": spec.num_vectors,
        "vector_length": spec.vector_length,
        "topk": spec.topk,
        "save_only_topk_weights": topk_only,
        "vblora_dropout": 0.0,
        "bias": "none",
    }


def _factors(part: RowSlice, rows: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Per-row values of one linear in PEFT's two layouts: A (r, in/b, ...) and B (out/b, r, ...)."""
    a = rows[part.start : part.middle].reshape(rank, -1, *rows.shape[1:])
    b = rows[part.middle : part.stop].reshape(rank, -1, *rows.shape[1:])
    return np.ascontiguousarray(a), np.ascontiguousarray(b.swapaxes(0, 1))


def _full_logits(state: State, blueprint: Blueprint) -> Arrays:
    logits = dense_logits(state, blueprint)
    tensors: Arrays = {}
    for part in blueprint.slices:
        name = f"{PREFIX}{part.linear.name}.vblora_logits"
        tensors[f"{name}_A"], tensors[f"{name}_B"] = _factors(part, logits, blueprint.spec.rank)
    return tensors


def _topk_logits(state: State, blueprint: Blueprint) -> Arrays:
    spec, topk = blueprint.spec, state.topk
    assert isinstance(spec, VBLoRASpec)
    assert topk is not None
    order = seeded.order(spec.seed, np.arange(blueprint.rows), spec.num_vectors, spec.num_vectors)
    # PEFT's own rule for the width of an index.
    kind = np.uint8 if spec.num_vectors < 2**8 else np.int16 if spec.num_vectors < 2**15 else np.int32
    indices = np.take_along_axis(order, topk.positions.astype(np.int64), axis=1).astype(kind)
    weights = mixture_weights(topk.gaps)[:, :-1].astype(np.float32)
    tensors: Arrays = {}
    for part in blueprint.slices:
        name = f"{PREFIX}{part.linear.name}.vblora_logits"
        for values, suffix in ((indices, "topk_indices"), (weights, "topk_weights")):
            tensors[f"{name}_A_{suffix}"], tensors[f"{name}_B_{suffix}"] = _factors(part, values, spec.rank)
    return tensors


def _lora_factors(state: State, blueprint: Blueprint) -> Arrays:
    tensors: Arrays = {}
    for part in blueprint.slices:
        a, b = state.dense["rows"][part.start : part.middle], state.dense["rows"][part.middle : part.stop]
        name = PREFIX + part.linear.name
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(blueprint.spec.rank, -1))
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(blueprint.spec.rank, -1).T)
    return tensors


def _head_names(blueprint: Blueprint) -> list[str]:
    return [tensor.name for tensor in blueprint.head]


def _head(state: State, blueprint: Blueprint) -> Arrays:
    tensors: Arrays = {}
    start = 0
    for tensor in blueprint.head:
        tensors[PREFIX + tensor.name] = state.dense["head"][start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return tensors
