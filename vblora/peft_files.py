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

from vblora.anchors import anchored
from vblora.errors import ExportError
from vblora.files import safetensors_bytes, write_atomic
from vblora.spec import (
    BankOnlySpec,
    Blueprint,
    FFALoRASpec,
    LoRASpec,
    LoRAXSSpec,
    RowSlice,
    UniLoRASpec,
    VBLoRASpec,
)
from vblora.start import chosen_vectors, order_of
from vblora.state import State, lora_rows, mixture_weights, theta_places

__all__ = ["PEFT_FILES", "dense_logits", "export_lora", "export_peft"]

PREFIX = "base_model.model."
FORMAT = "fedvb-export-1"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_FILES = frozenset({CONFIG, WEIGHTS})  # all that an export consists of
CONV1D_MODELS = ("gpt2-", "openai-gpt-")  # their weights are stored transposed; PEFT warns unless told
Arrays = dict[str, NDArray[Any]]


def export_peft(
    state: State, blueprint: Blueprint, directory: Path, *, base: str, form: Literal["full", "topk"] = "full"
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` of the kind that PEFT knows the adapter by.

    Args:
        state: the adapter.
        blueprint: what it means.
        directory: made where it is missing.
        base: name or path of the base model, for the config.
        form: of adapters with a bank: "full" dense logits, or "topk". The others have one form.

    Raises:
        ExportError: rows are cut, or the kind is LoRA-XS, which PEFT's format cannot say.
    """
    spec = blueprint.spec
    match spec:
        case VBLoRASpec() | BankOnlySpec():
            if blueprint.cut_rows:
                raise ExportError(
                    f"format peft: {blueprint.cut_rows} rows are cut because vector-length "
                    f"{spec.vector_length} does not divide every layer's sides, and PEFT's format cannot say "
                    "that; use --format lora, or train with a vector length that divides"
                )
            tensors = _full_logits(state, blueprint) if form == "full" else _topk_logits(state, blueprint)
            tensors["base_model.vblora_vector_bank"] = state.dense["bank"]
            config = _vblora_config(spec, topk_only=form == "topk")
        case LoRASpec():
            return export_lora(state.dense["rows"], state, blueprint, directory, base=base)
        case FFALoRASpec():
            rows = lora_rows(blueprint)
            rows[blueprint.b_rows] = state.dense["rows"]
            return export_lora(rows, state, blueprint, directory, base=base)
        case UniLoRASpec():
            tensors, config = _uni_lora(state, blueprint, spec)
        case LoRAXSSpec():
            raise ExportError("format peft: PEFT has no LoRA-XS; use --format lora")
    return _write(tensors, config, state, blueprint, directory, base)


def export_lora(
    rows: NDArray[np.float32], state: State, blueprint: Blueprint, directory: Path, *, base: str
) -> Path:
    """Write any adapter as plain LoRA, for servers that know nothing else.

    Args:
        rows: (S, b) what the adapter's row source makes of `state`; the tail of a cut row is dropped.
        state: gives the head.
        blueprint, directory, base: as in `export_peft`.
    """
    rank = blueprint.spec.rank
    tensors: Arrays = {}
    for part in blueprint.slices:
        name, linear = PREFIX + part.linear.name, part.linear
        a = rows[part.start : part.middle].reshape(rank, -1)[:, : linear.in_features]
        b = rows[part.middle : part.stop].reshape(rank, -1)[:, : linear.out_features]
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b.T
    config = {
        "peft_type": "LORA",
        "lora_alpha": blueprint.spec.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return _write(tensors, config, state, blueprint, directory, base)


def _write(
    tensors: Arrays, config: dict[str, Any], state: State, blueprint: Blueprint, directory: Path, base: str
) -> Path:
    tensors |= _head(state, blueprint)
    config |= {
        "r": blueprint.spec.rank,
        "base_model_name_or_path": base,
        "target_modules": [linear.name for linear in blueprint.linears],
        "task_type": "SEQ_CLS" if blueprint.labels else "CAUSAL_LM",
        "modules_to_save": sorted({tensor.name.split(".")[0] for tensor in blueprint.head}) or None,
        "fan_in_fan_out": blueprint.model.startswith(CONV1D_MODELS),
        "inference_mode": True,
    }
    about = {
        "format": "pt",  # PEFT's readers ask for it
        "fedvb": FORMAT,
        "adapter": blueprint.fingerprint.hex(),
        "round": str(state.version),
    }
    write_atomic(directory / WEIGHTS, safetensors_bytes(tensors, about))
    write_atomic(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def dense_logits(state: State, blueprint: Blueprint) -> NDArray[np.float32]:
    """All logits of a state in the bank's order, (S, h): for export and for tests, never for training."""
    spec = blueprint.spec
    if not isinstance(spec, VBLoRASpec | BankOnlySpec):
        raise ExportError(f"adapter {spec.kind} has no logits")
    rows, places = np.arange(blueprint.rows), order_of(blueprint)
    order = places.vectors(rows, spec.num_vectors)
    values = places.logits(rows, spec.num_vectors)
    if isinstance(spec, VBLoRASpec) and state.topk is not None:
        chosen = anchored(spec, values, state.topk, keep=places.exact)
        np.put_along_axis(values, state.topk.positions.astype(np.int64), chosen, axis=1)
    logits = np.empty_like(values)
    np.put_along_axis(logits, order.astype(np.int64), values, axis=1)
    return logits


def _vblora_config(spec: VBLoRASpec | BankOnlySpec, topk_only: bool) -> dict[str, Any]:
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
    spec, places = blueprint.spec, order_of(blueprint)
    assert isinstance(spec, VBLoRASpec | BankOnlySpec)
    if state.topk is not None:
        chosen, gaps = chosen_vectors(places, state.topk.positions), state.topk.gaps
    else:  # the selection stays at version 0
        rows = np.arange(blueprint.rows)
        chosen, logits = places.vectors(rows, spec.topk), places.logits(rows, spec.topk)
        gaps = logits[:, :1] - logits[:, 1:]
    # PEFT's own rule for the width of an index.
    kind = np.uint8 if spec.num_vectors < 2**8 else np.int16 if spec.num_vectors < 2**15 else np.int32
    indices, weights = chosen.astype(kind), mixture_weights(gaps)[:, :-1].astype(np.float32)
    tensors: Arrays = {}
    for part in blueprint.slices:
        name = f"{PREFIX}{part.linear.name}.vblora_logits"
        for values, suffix in ((indices, "topk_indices"), (weights, "topk_weights")):
            tensors[f"{name}_A_{suffix}"], tensors[f"{name}_B_{suffix}"] = _factors(part, values, spec.rank)
    return tensors


def _uni_lora(state: State, blueprint: Blueprint, spec: UniLoRASpec) -> tuple[Arrays, dict[str, Any]]:
    """Theta, and beside it the places and scales that PEFT would draw otherwise than we do."""
    places, scales = theta_places(spec, blueprint)
    tensors: Arrays = {"base_model.unilora_theta_d": state.dense["theta"]}
    for part in blueprint.slices:
        name = PREFIX + part.linear.name
        for what, values in (("indices", places.astype(np.int64)), ("scales", scales[places])):
            a, b = values[part.start : part.middle], values[part.middle : part.stop]
            tensors[f"{name}.unilora_{what}_A"] = a.reshape(spec.rank, -1)
            tensors[f"{name}.unilora_{what}_B"] = b.reshape(spec.rank, -1).T
    config = {
        "peft_type": "UNILORA",
        "theta_d_length": spec.theta_length,
        "save_indices": True,
        "unilora_dropout": 0.0,
        "bias": "none",
    }
    return tensors, config


def _head(state: State, blueprint: Blueprint) -> Arrays:
    tensors: Arrays = {}
    start = 0
    for tensor in blueprint.head:
        tensors[PREFIX + tensor.name] = state.dense["head"][start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return tensors
