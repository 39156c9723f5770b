"""What server and client must agree on before a number travels: the blueprint of one adapter.

The kinds of adapter and their numbers are in `vblora.adapters`. Axes used in this package: S rows
(sub-vectors) of the whole model, b vector length, h bank vectors, k mixed vectors a row, r rank, C clients of
a cohort.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from vblora.adapters import (
    ADAPTERS,
    AdapterSpec,
    BankOnlySpec,
    FFALoRASpec,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
    VBLoRASpec,
)
from vblora.errors import ConfigError, ModelError
from vblora.start import Start

__all__ = [
    "ADAPTERS",
    "AdapterSpec",
    "BankOnlySpec",
    "Blueprint",
    "FFALoRASpec",
    "HeadTensor",
    "Linear",
    "LoRASpec",
    "LoRAXSSpec",
    "RowSlice",
    "UniLoRASpec",
    "VBLoRASpec",
    "choose_num_vectors",
    "choose_vector_length",
    "row_slices",
]


@dataclass(frozen=True)
class Linear:
    """One adapted linear layer: `y = W x` with W of shape (out_features, in_features)."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class HeadTensor:
    """One trained tensor of the task head, by its name in the base model."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class RowSlice:
    """Where one linear's factors lie among the S rows.

    Rows `start:middle` hold A, shape (r, in): row-major, `ceil(in / b)` sub-vectors a row. Rows `middle:stop`
    hold B transposed, shape (r, out), the same way. The last sub-vector is cut where b does not divide.
    """

    linear: Linear
    start: int
    middle: int
    stop: int


def row_slices(linears: Iterable[Linear], rank: int, vector_length: int) -> Iterator[RowSlice]:
    """Lay the factors of `linears` end to end as rows of length `vector_length`."""
    start = 0
    for linear in linears:
        middle = start + rank * -(-linear.in_features // vector_length)
        stop = middle + rank * -(-linear.out_features // vector_length)
        yield RowSlice(linear, start, middle, stop)
        start = stop


@dataclass(frozen=True)
class Blueprint:
    """Everything that gives the numbers of a state their meaning. Two sites with one fingerprint can average.

    Attributes:
        spec: the adapter.
        linears: adapted layers, in the order of their rows.
        head: trained tensors of the task head, in the order of the flat section "head"; empty without one.
        model: architecture of the base, as `model_type` and sizes; not its name, which differs between sites.
        labels: label names by class index; empty for language modelling.
        start: the adapter of a file that version 0 is, in place of what the seed draws.
    """

    spec: AdapterSpec
    linears: tuple[Linear, ...]
    head: tuple[HeadTensor, ...] = ()
    model: str = ""
    labels: tuple[str, ...] = ()
    start: Start | None = None

    def __post_init__(self) -> None:
        if not self.linears:
            raise ModelError(
                "blueprint: no linear layer to adapt; check --target-modules against the base model"
            )
        if faults := list(self._faults()):
            raise ModelError("blueprint: " + "; ".join(faults))

    def _faults(self) -> Iterator[str]:
        names = [lin.name for lin in self.linears] + [tensor.name for tensor in self.head]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            yield f"{', '.join(twice)} is named twice"
        for lin in self.linears:
            if min(lin.in_features, lin.out_features) < 1:
                yield f"{lin.name} has sides {lin.in_features} and {lin.out_features}, expected 1 or more"
        for tensor in self.head:
            if min(tensor.shape, default=1) < 1:
                yield f"{tensor.name} has shape {tensor.shape}, expected sides of 1 or more"
        yield from _misfits(self.spec, self.linears)

    @cached_property
    def slices(self) -> tuple[RowSlice, ...]:
        return tuple(row_slices(self.linears, self.spec.rank, self.vector_length))

    @cached_property
    def vector_length(self) -> int:
        return self.spec.row_length(self.linears)

    @property
    def rows(self) -> int:
        """S, rows of the whole model."""
        return self.slices[-1].stop

    @cached_property
    def head_size(self) -> int:
        return sum(tensor.size for tensor in self.head)

    @cached_property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the float sections of a state, by name; "head" last, only where there is one."""
        shapes = dict(self.spec.dense_shapes(self.linears))
        if self.head_size:
            shapes["head"] = (self.head_size,)
        return shapes

    @property
    def topk_shape(self) -> tuple[int, int, int] | None:
        """(S, k, h) where a selection is trained, else None."""
        spec = self.spec
        return (self.rows, spec.topk, spec.num_vectors) if isinstance(spec, VBLoRASpec) else None

    @cached_property
    def b_rows(self) -> list[int]:
        """Numbers of the rows that are B's, in their order."""
        return [row for part in self.slices for row in range(part.middle, part.stop)]

    @property
    def cut_rows(self) -> int:
        """Rows whose tail lies outside the factor because b does not divide the side."""
        b, r = self.vector_length, self.spec.rank
        return sum(r * ((lin.in_features % b > 0) + (lin.out_features % b > 0)) for lin in self.linears)

    @property
    def trained_parameters(self) -> int:
        """Numbers that receive gradients, logits counted densely as S times h."""
        dense = sum(math.prod(shape) for shape in self.dense_shapes.values())
        return dense + (self.topk_shape[0] * self.topk_shape[2] if self.topk_shape else 0)

    @property
    def stored_parameters(self) -> int:
        """Numbers that a state is made of: k indices and k - 1 weights a row, the bank, the head."""
        dense = sum(math.prod(shape) for shape in self.dense_shapes.values())
        return dense + (self.topk_shape[0] * (2 * self.topk_shape[1] - 1) if self.topk_shape else 0)

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that name this blueprint in every message."""
        return hashlib.sha256(self.to_json().encode()).digest()[:16]

    def to_json(self) -> str:
        """Canonical text form; `from_json` reads it back."""
        # Of the default's kind, so that alpha 16 and 16.0 are one blueprint.
        numbers: dict[str, Any] = {
            entry.name: (int if isinstance(entry.default, int) else float)(getattr(self.spec, entry.name))
            for entry in fields(self.spec)
        }
        spec = {"kind": self.spec.kind, **numbers}
        linears = [[lin.name, lin.in_features, lin.out_features] for lin in self.linears]
        head = [[tensor.name, list(tensor.shape)] for tensor in self.head]
        body: dict[str, Any] = {
            "spec": spec,
            "linears": linears,
            "head": head,
            "model": self.model,
            "labels": list(self.labels),
        }
        if self.start is not None:
            body["start"] = self.start.digest
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Blueprint:
        """Read `to_json`'s text. Of a start only the name is known then.

        Raises:
            ModelError: the text is not a blueprint.
        """
        try:
            body = json.loads(text)
            spec: dict[str, Any] = body["spec"]
            kind = ADAPTERS[spec["kind"]]
            known = {field.name for field in fields(kind)}
            return cls(
                spec=kind(**{name: value for name, value in spec.items() if name in known}),
                linears=tuple(Linear(str(n), int(i), int(o)) for n, i, o in body["linears"]),
                head=tuple(HeadTensor(str(n), tuple(int(d) for d in shape)) for n, shape in body["head"]),
                model=str(body["model"]),
                labels=tuple(str(label) for label in body["labels"]),
                start=Start(bytes.fromhex(body["start"]).hex()) if "start" in body else None,
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, ConfigError) as error:
            raise ModelError(f"blueprint: not readable ({type(error).__name__}: {error})") from error


def _misfits(spec: AdapterSpec, linears: tuple[Linear, ...]) -> Iterator[str]:
    """Sizes of an adapter that these layers cannot have."""
    if isinstance(spec, LoRAXSSpec):
        for lin in linears:
            if (side := min(lin.in_features, lin.out_features)) < spec.rank:
                yield f"{lin.name} has {side} singular vectors, rank is {spec.rank}; lower --rank"
    if isinstance(spec, UniLoRASpec):
        entries = sum(spec.rank * (lin.in_features + lin.out_features) for lin in linears)
        if entries < spec.theta_length:
            yield f"theta-length (d) is {spec.theta_length}, the factors have {entries} entries; lower it"


def choose_vector_length(linears: Iterable[Linear]) -> int:
    """b when none is given: the largest power of two up to 256 that divides every side, at least 32.

    The paper's ablation peaks at 256 and is flat from 128 to 512. Where even 32 would cut rows, 64 cuts them.
    """
    divisor = math.gcd(*(side for lin in linears for side in (lin.in_features, lin.out_features)))
    fitting = [length for length in (256, 128, 64, 32) if divisor % length == 0]
    return fitting[0] if fitting else 64


def choose_num_vectors(rows: int) -> int:
    """h when none is given: about a quarter of the rows, a power of two from 64 to 2048."""
    return 1 << min(11, max(6, (rows // 4).bit_length() - 1))
