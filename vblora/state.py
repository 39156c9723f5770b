"""The numbers that travel: the reference state that all hold, a client's update against it. NumPy only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vblora import seeded
from vblora.errors import UpdateError
from vblora.spec import (
    BankOnlySpec,
    Blueprint,
    FFALoRASpec,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
    VBLoRASpec,
)
from vblora.start import order_of

__all__ = [
    "State",
    "TopK",
    "Update",
    "check_update",
    "content_faults",
    "initial_state",
    "lora_rows",
    "mixture_weights",
    "theta_places",
]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TopK:
    """The selection of every row: which bank vectors are mixed, and how.

    Attributes:
        positions: (S, k) int32, places in the row's seeded order (`seeded.order`), largest logit first.
        gaps: (S, k - 1) float32, first logit minus each later one: non-negative, rising along a row.
    """

    positions: NDArray[np.int32]
    gaps: Floats

    def same_rows(self, other: TopK) -> NDArray[np.bool_]:
        """(S,) true where the selection of a row is the same to the bit."""
        same_sets = (self.positions == other.positions).all(axis=1)
        return np.asarray(same_sets & (self.gaps == other.gaps).all(axis=1))


@dataclass(frozen=True)
class State:
    """The global adapter after `version` rounds, equal to the bit on the server and wherever it is held.

    Attributes:
        version: rounds aggregated into it; 0 is drawn from the seed.
        dense: float32 sections by name, shapes as in `Blueprint.dense_shapes`.
        topk: the selection, for adapters that choose rows from a bank.
    """

    version: int
    dense: Mapping[str, Floats]
    topk: TopK | None = None

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name this state's exact content."""
        content = hashlib.sha256(self.version.to_bytes(8, "little"))
        for name, array in sorted(self.dense.items()):
            content.update(name.encode())
            content.update(np.ascontiguousarray(array, "<f4").data)
        if self.topk is not None:
            content.update(np.ascontiguousarray(self.topk.positions, "<i4").data)
            content.update(np.ascontiguousarray(self.topk.gaps, "<f4").data)
        return content.digest()[:16]


@dataclass(frozen=True)
class Update:
    """What one client sends: its change of the dense sections, and its selection.

    Attributes:
        version: of the state that it trained from.
        reference: digest of that state.
        examples: texts that it trained on in this round; its weight in the mean.
        dense: change against the reference, float32, by section.
        topk: the client's own selection after training; a row equal to the reference counts as unchanged.
        steps: where a section was rounded to whole steps (`vblora.rounding`), the step.
    """

    version: int
    reference: bytes
    examples: int
    dense: Mapping[str, Floats]
    topk: TopK | None = None
    steps: Mapping[str, float] = field(default_factory=dict)


def initial_state(blueprint: Blueprint) -> State:
    """Version 0, drawn from the seed alone, or held as `blueprint.start`.

    The server and every client call this instead of sending it.

    Raises:
        ModelError: it goes on from an adapter that is not held here.
    """
    found = blueprint.start.held if blueprint.start is not None else None
    dense = _initial_adapter(blueprint) if found is None else dict(found.dense)
    if blueprint.head_size and "head" not in dense:
        dense["head"] = _initial_head(blueprint)
    if not isinstance(blueprint.spec, VBLoRASpec):
        return State(0, dense)
    rows, k = np.arange(blueprint.rows), blueprint.spec.topk
    if found is None or found.gaps is None:
        logits = order_of(blueprint).logits(rows, k)
        gaps = logits[:, :1] - logits[:, 1:]
    else:
        gaps = found.gaps
    return State(0, dense, TopK(np.tile(np.arange(k, dtype=np.int32), (len(rows), 1)), gaps))


def mixture_weights(gaps: Floats) -> NDArray[np.float64]:
    """(S, k) softmax of the chosen logits, from their gaps to the first. Rows sum to 1."""
    scores = np.exp(-np.concatenate([np.zeros((len(gaps), 1)), gaps.astype(np.float64)], axis=1))
    return np.asarray(scores / scores.sum(axis=1, keepdims=True))


def check_update(update: Update, blueprint: Blueprint, state: State) -> None:
    """Refuse what must never reach the mean.

    Raises:
        UpdateError: another reference, a missing or unknown section, a wrong shape, a number that is not
            finite, an index out of range or twice in a row, gaps out of order, or no examples.
    """
    if faults := list(_update_faults(update, blueprint, state)):
        raise UpdateError("update: " + "; ".join(faults))


def _update_faults(update: Update, blueprint: Blueprint, state: State) -> Iterator[str]:
    if update.version != state.version or update.reference != state.digest:
        yield (
            f"trained from version {update.version} ({update.reference.hex()[:8]}), "
            f"expected {state.version} ({state.digest.hex()[:8]})"
        )
    if not 0 < update.examples < 1 << 31:
        yield f"examples is {update.examples}, expected 1 to 2^31 - 1"
    yield from content_faults(update.dense, update.topk, blueprint)


def content_faults(dense: Mapping[str, Floats], topk: TopK | None, blueprint: Blueprint) -> Iterator[str]:
    """What is wrong with the numbers of a state or an update, in words: sections, shapes, bounds, order."""
    expected = blueprint.dense_shapes
    if set(dense) != set(expected):
        yield f"sections are {sorted(dense)}, expected {sorted(expected)}"
        return
    for name, array in dense.items():
        if array.shape != expected[name]:
            yield f"{name} has shape {array.shape}, expected {expected[name]}"
        elif not np.isfinite(array).all():
            yield f"{name} holds {int((~np.isfinite(array)).sum())} numbers that are not finite"
    if (topk is None) != (blueprint.topk_shape is None):
        yield "the selection is missing" if topk is None else "a selection where none is expected"
    elif topk is not None and blueprint.topk_shape is not None:
        yield from _topk_faults(topk, blueprint.topk_shape)


def _topk_faults(topk: TopK, shape: tuple[int, int, int]) -> Iterator[str]:
    rows, k, h = shape
    if topk.positions.shape != (rows, k) or topk.gaps.shape != (rows, k - 1):
        found = f"{topk.positions.shape} and {topk.gaps.shape}"
        yield f"selection has shapes {found}, expected {(rows, k)} and {(rows, k - 1)}"
        return
    if topk.positions.size and not 0 <= int(topk.positions.min()) <= int(topk.positions.max()) < h:
        yield f"positions run from {topk.positions.min()} to {topk.positions.max()}, expected 0 to {h - 1}"
    if (np.diff(np.sort(topk.positions, axis=1), axis=1) == 0).any():
        yield "a row names one position twice"
    if not np.isfinite(topk.gaps).all():
        yield "gaps are not finite"
    elif topk.gaps.size and ((topk.gaps[:, 0] < 0).any() or (np.diff(topk.gaps, axis=1) < 0).any()):
        yield "gaps are not rising from 0"


def lora_rows(blueprint: Blueprint) -> Floats:
    """(S, b) rows of LoRA at its start: A uniform with bound 1/sqrt(in), B zero."""
    length = blueprint.vector_length
    rows = np.zeros((blueprint.rows, length), np.float32)
    for part in blueprint.slices:
        count, bound = (part.middle - part.start) * length, part.linear.in_features**-0.5
        drawn = seeded.uniform(blueprint.spec.seed, "rows", part.start * length, count, bound)
        rows[part.start : part.middle] = drawn.reshape(-1, length)
    return rows


def theta_places(spec: UniLoRASpec, blueprint: Blueprint) -> tuple[NDArray[np.int32], Floats]:
    """Uni-LoRA's map, drawn from the seed: which place of theta each entry of the rows reads, and the scales.

    Returns:
        Places (S, b) in 0 to d - 1, and 1 / sqrt(entries that read it) of each place, (d,).
    """
    entries = blueprint.rows * blueprint.vector_length
    places = seeded.integers(spec.seed, "places", entries, spec.theta_length)
    readers = np.bincount(places, minlength=spec.theta_length)
    scales = (np.maximum(readers, 1) ** -0.5).astype(np.float32)
    return places.reshape(blueprint.rows, -1), scales


def _initial_adapter(blueprint: Blueprint) -> dict[str, Floats]:
    """The dense sections of version 0, without the head."""
    spec = blueprint.spec
    ((name, shape),) = spec.dense_shapes(blueprint.linears).items()
    match spec:
        case VBLoRASpec() | BankOnlySpec():
            drawn = seeded.uniform(spec.seed, "bank", 0, shape[0] * shape[1], spec.bank_bound)
        case LoRASpec():
            drawn = lora_rows(blueprint)
        case UniLoRASpec():
            drawn = seeded.uniform(spec.seed, "theta", 0, spec.theta_length, spec.theta_bound)
        case FFALoRASpec() | LoRAXSSpec():
            drawn = np.zeros(shape, np.float32)
    return {name: drawn.reshape(shape)}


def _initial_head(blueprint: Blueprint) -> Floats:
    """Weights uniform with standard deviation 0.02, biases (one axis) zero: as transformers starts one."""
    head = np.zeros(blueprint.head_size, np.float32)
    start = 0
    for tensor in blueprint.head:
        if len(tensor.shape) > 1:
            bound = 0.02 * 3**0.5
            head[start : start + tensor.size] = seeded.uniform(
                blueprint.spec.seed, "head", start, tensor.size, bound
            )
        start += tensor.size
    return head
