"""Adapters that PEFT saved, read: LoRA, and VB-LoRA with full logits or in top-k form, of any float type.

What is read becomes version 0 (`vblora.start`). Dense logits bring their own order with them, so training
goes on exactly; top-k form brings the chosen vectors alone, which come first in an order whose rest is
seeded. PEFT itself cannot train on from top-k form, nor load one of 16-bit floats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.errors import ConfigError, StartError
from vblora.files import read_tensors
from vblora.spec import Blueprint, LoRASpec, RowSlice, VBLoRASpec
from vblora.start import LARGEST_LOGIT, ChosenFirst, Content, Found, SeededOrder, SortedOrder

__all__ = ["read_peft"]

PREFIX = "base_model.model."
BANK = "base_model.vblora_vector_bank"
OF_A_LAYER = re.compile(
    r"base_model\.model\.(.+)\.(lora_[AB]\.weight|vblora_logits_[AB](_topk_(indices|weights))?)"
)
# Options of PEFT that change what the tensors mean; none may be set.
FOREIGN = (
    *("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
)
# Ways to begin that take what B A starts from out of the base: the files mean nothing without that base.
ALTERS_BASE = ("pissa", "corda", "loftq", "olora", "lora_ga")
LEAST_WEIGHT = 2.0**-24  # of a vector whose weight 16-bit floats have rounded to nothing

Arrays = Mapping[str, NDArray[Any]]


def read_peft(folder: Path, seed: int) -> Found:
    """Read a folder with adapter_config.json and adapter_model.safetensors.

    Args:
        folder: as `PeftModel.save_pretrained` leaves it.
        seed: of what it does not say.

    Raises:
        StartError: a file is missing or damaged, or has parts that cannot be trained here.
    """
    config = _read_config(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise StartError(
            f"start {folder}: weights are in adapter_model.bin, a pickle; "
            "expected adapter_model.safetensors, save it again with PEFT"
        )
    tensors = read_tensors(path)
    fits = [OF_A_LAYER.fullmatch(name) for name in tensors]
    layers = frozenset(fit[1] for fit in fits if fit)
    if not layers:
        raise StartError(f"start {folder}: no adapted layer in {path.name}, expected {config['peft_type']}'s")
    if broken := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
        raise StartError(
            f"start {folder}: {broken[0]} holds numbers that are not finite; logits that PEFT loaded from "
            "top-k form do: use the folder in top-k form itself"
        )
    spec = _spec(folder, config, seed)

    def read(blueprint: Blueprint) -> Content:
        source = _Tensors(str(folder), tensors)
        head = source.head(blueprint)
        if isinstance(spec, LoRASpec):
            content = Content({"rows": source.lora(blueprint)})
        elif any(name.endswith("_topk_indices") for name in tensors):
            content = source.chosen(blueprint, spec)
        else:
            content = source.logits(blueprint, spec)
        source.finish()
        return replace(content, dense={**content.dense, **head})

    return Found(str(folder), spec, layers, read)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(f"start {folder}: adapter_config.json is not readable ({error})") from error
    if kind not in ("LORA", "VBLORA"):
        raise StartError(f"start {folder}: a PEFT adapter of type {kind}, expected LORA or VBLORA")
    set_there = [name for name in FOREIGN if config.get(name)]
    set_there += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    if set_there:
        raise StartError(f"start {folder}: it uses {', '.join(set_there)}, which cannot be trained here")
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(ALTERS_BASE):
        raise StartError(
            f"start {folder}: it was begun by {begun}, which alters the base; save it again as plain LoRA, "
            "with path_initial_model_for_weight_conversion"
        )
    return dict(config)


def _spec(folder: Path, config: dict[str, Any], seed: int) -> LoRASpec | VBLoRASpec:
    try:
        rank = config["r"]
        if config["peft_type"] == "LORA":
            # scaled by alpha / r here, by alpha / sqrt(r) in rank-stabilised LoRA
            alpha = config["lora_alpha"] * (rank**0.5 if config.get("use_rslora") else 1)
            return LoRASpec(rank=rank, alpha=alpha, seed=seed)
        names = {"num_vectors": "num_vectors", "vector_length": "vector_length", "topk": "topk"}
        numbers = {name: config[key] for name, key in names.items()}
        std = config.get("init_logits_std", VBLoRASpec.init_std)
        return VBLoRASpec(rank=rank, init_std=std, seed=seed, **numbers)
    except (KeyError, TypeError, ConfigError) as error:
        raise StartError(f"start {folder}: adapter_config.json: {type(error).__name__}: {error}") from error


@dataclass
class _Tensors:
    """PEFT's tensors on their way into rows; each is taken once."""

    where: str
    tensors: Arrays

    def __post_init__(self) -> None:
        self._left = set(self.tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if name not in self.tensors:
            raise StartError(f"start {self.where}: {name} is missing")
        found = self.tensors[name]
        if found.shape != shape:
            raise StartError(
                f"start {self.where}: {name} has shape {found.shape}, expected {shape}; "
                "is the base the one that it was trained on?"
            )
        self._left.discard(name)
        return found

    def finish(self) -> None:
        """See that every tensor was taken."""
        if left := sorted(self._left):
            raise StartError(
                f"start {self.where}: {left[0]} has no place here"
                + (f", nor have {len(left) - 1} others" if len(left) > 1 else "")
            )

    def head(self, blueprint: Blueprint) -> dict[str, NDArray[np.float32]]:
        """The section `head`; nothing where the file has none."""
        saved = {name.replace(".modules_to_save", ""): name for name in self.tensors}
        names = [PREFIX + tensor.name for tensor in blueprint.head]
        if not set(names) & set(saved):
            return {}
        parts = [
            self.take(saved.get(name, name), tensor.shape).ravel()
            for name, tensor in zip(names, blueprint.head, strict=True)
        ]
        return {"head": np.concatenate(parts).astype(np.float32)}

    def lora(self, blueprint: Blueprint) -> NDArray[np.float32]:
        r, length = blueprint.spec.rank, blueprint.vector_length
        rows = np.empty((blueprint.rows, length), np.float32)
        for part in blueprint.slices:
            name, linear = PREFIX + part.linear.name, part.linear
            a = self.take(f"{name}.lora_A.weight", (r, linear.in_features))
            b = self.take(f"{name}.lora_B.weight", (linear.out_features, r))
            rows[part.start : part.middle] = a.reshape(-1, length)
            rows[part.middle : part.stop] = b.T.reshape(-1, length)
        return rows

    def logits(self, blueprint: Blueprint, spec: VBLoRASpec) -> Content:
        """Full form: every row's order is that of its logits."""
        logits = self._per_row(blueprint, "", (spec.num_vectors,), np.float32)
        if (largest := np.abs(logits).max()) > LARGEST_LOGIT:
            raise StartError(
                f"start {self.where}: logits reach {largest:g} in size, expected {LARGEST_LOGIT:g} at most"
            )
        order = SortedOrder(logits)
        first = order.logits(np.arange(blueprint.rows), spec.topk)
        return Content(self._bank(spec), order, first[:, :1] - first[:, 1:])

    def chosen(self, blueprint: Blueprint, spec: VBLoRASpec) -> Content:
        """Top-k form: k indices and k - 1 weights a row."""
        k = spec.topk
        indices = self._per_row(blueprint, "_topk_indices", (k,), np.int32)
        weights = self._per_row(blueprint, "_topk_weights", (k - 1,), np.float64)
        if faults := list(_index_faults(indices, spec.num_vectors)):
            raise StartError(f"start {self.where}: {faults[0]}")
        weights = np.concatenate([weights, 1 - weights.sum(axis=1, keepdims=True)], axis=1)
        weights = np.maximum(weights, LEAST_WEIGHT)
        falling = np.argsort(-weights, axis=1, kind="stable")
        weights = np.take_along_axis(weights, falling, axis=1)
        gaps = np.log(weights[:, :1] / weights[:, 1:]).astype(np.float32)
        seeds = SeededOrder(spec.seed, spec.num_vectors, spec.init_std)
        order = ChosenFirst(seeds, np.take_along_axis(indices, falling, axis=1))
        return Content(self._bank(spec), order, np.maximum.accumulate(gaps, axis=1))

    def _bank(self, spec: VBLoRASpec) -> dict[str, NDArray[np.float32]]:
        return {"bank": self.take(BANK, (spec.num_vectors, spec.vector_length)).astype(np.float32)}

    def _per_row(self, blueprint: Blueprint, suffix: str, tail: tuple[int, ...], kind: Any) -> NDArray[Any]:
        """(S, ...) of what PEFT holds by layer as A (r, in/b, ...) and B (out/b, r, ...)."""
        rows = np.empty((blueprint.rows, *tail), kind)
        for part in blueprint.slices:
            name = f"{PREFIX}{part.linear.name}.vblora_logits"
            of_a, of_b = _pieces(part, blueprint.spec.rank)
            a = self.take(f"{name}_A{suffix}", (blueprint.spec.rank, of_a, *tail))
            b = self.take(f"{name}_B{suffix}", (of_b, blueprint.spec.rank, *tail))
            rows[part.start : part.middle] = a.reshape(-1, *tail)
            rows[part.middle : part.stop] = b.swapaxes(0, 1).reshape(-1, *tail)
        return rows


def _pieces(part: RowSlice, rank: int) -> tuple[int, int]:
    """Sub-vectors of a row of A, and of a column of B."""
    return (part.middle - part.start) // rank, (part.stop - part.middle) // rank


def _index_faults(indices: NDArray[np.int32], num_vectors: int) -> Iterator[str]:
    if indices.size and not 0 <= indices.min() <= indices.max() < num_vectors:
        yield f"indices run from {indices.min()} to {indices.max()}, expected 0 to {num_vectors - 1}"
    if (np.diff(np.sort(indices, axis=1), axis=1) == 0).any():
        yield "a row names one vector twice"
