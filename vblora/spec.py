"""What server and client must agree on before a number travels: the blueprint of one adapter.

Axes used in this package: S rows (sub-vectors) of the whole model, b vector length, h bank vectors, k mixed
vectors a row, r rank, C clients of a cohort.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar

from vblora.errors import ConfigError, ModelError, raise_faults

__all__ = [
    "ADAPTERS",
    "AdapterSpec",
    "Blueprint",
    "HeadTensor",
    "Linear",
    "LoRASpec",
    "RowSlice",
    "VBLoRASpec",
    "choose_num_vectors",
    "choose_vector_length",
    "row_slices",
]

MAX_NUM_VECTORS = 1 << 20
MAX_SEED = 1 << 62


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
class VBLoRASpec:
    """VB-LoRA (arXiv 2405.15179, eq. 3-5): rows are top-k mixtures of a shared bank of h vectors of length b.

    Attributes:
        rank: r of every pair of factors.
        num_vectors: h, vectors in the bank.
        vector_length: b, length of a vector.
        topk: k vectors mixed into a row. With k = 1 the selection never changes: softmax of one is constant.
        init_std: standard deviation of the initial logits (paper 0.01, PEFT 0.1).
        bank_bound: the bank starts uniform in (-bank_bound, bank_bound).
        margin: least distance from a chosen logit to the best of the others when a state is re-anchored.
        seed: of everything that both sides draw instead of sending.
    """

    kind: ClassVar[str] = "vblora"
    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_std: float = 0.1
    bank_bound: float = 0.02
    margin: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("adapter vblora", list(_kind_faults(self)) or self._faults())

    def _faults(self) -> Iterator[str]:
        if not 1 <= self.rank <= 1024:
            yield f"rank is {self.rank}, expected 1 to 1024"
        if not 1 <= self.num_vectors <= MAX_NUM_VECTORS:
            yield f"num-vectors (h) is {self.num_vectors}, expected 1 to {MAX_NUM_VECTORS}"
        if not 1 <= self.vector_length <= 65536:
            yield f"vector-length (b) is {self.vector_length}, expected 1 to 65536"
        if not 1 <= self.topk <= 64:
            yield f"topk (k) is {self.topk}, expected 1 to 64"
        elif self.topk > self.num_vectors >= 1:
            yield f"topk (k) is {self.topk}, the bank has num-vectors (h) {self.num_vectors}; choose k <= h"
        if not 0 < self.init_std <= 10:
            yield f"init-std is {self.init_std}, expected above 0, at most 10"
        if not 0 < self.bank_bound <= 10:
            yield f"bank-bound is {self.bank_bound}, expected above 0, at most 10"
        if not 1e-4 <= self.margin <= 10:
            yield f"margin is {self.margin}, expected 0.0001 to 10 (0 would tie a chosen logit with the next)"
        if not 0 <= self.seed < MAX_SEED:
            yield f"seed is {self.seed}, expected 0 to 2^62 - 1"

    @property
    def scaling(self) -> float:
        """Factor on B A x. VB-LoRA has none."""
        return 1.0

    def row_length(self, linears: tuple[Linear, ...]) -> int:
        return self.vector_length

    def dense_shapes(self, linears: tuple[Linear, ...]) -> dict[str, tuple[int, ...]]:
        return {"bank": (self.num_vectors, self.vector_length)}

    def topk_shape(self, rows: int) -> tuple[int, int, int] | None:
        """(S, k, h) of the selection."""
        return rows, self.topk, self.num_vectors


@dataclass(frozen=True)
class LoRASpec:
    """LoRA (arXiv 2106.09685) as free rows: the same layers, the rows themselves are trained.

    Attributes:
        rank: r of every pair of factors.
        alpha: B A x is scaled by alpha / r.
        seed: of the initial A (uniform, bound 1/sqrt(in), as PEFT draws it); B starts at zero.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("adapter lora", list(_kind_faults(self)) or self._faults())

    def _faults(self) -> Iterator[str]:
        if not 1 <= self.rank <= 1024:
            yield f"rank is {self.rank}, expected 1 to 1024"
        if not 0 < self.alpha <= 65536:
            yield f"alpha is {self.alpha}, expected above 0, at most 65536"
        if not 0 <= self.seed < MAX_SEED:
            yield f"seed is {self.seed}, expected 0 to 2^62 - 1"

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def row_length(self, linears: tuple[Linear, ...]) -> int:
        """The largest length that divides every side, so no row is cut and nothing is trained in vain."""
        return math.gcd(*(side for lin in linears for side in (lin.in_features, lin.out_features)))

    def dense_shapes(self, linears: tuple[Linear, ...]) -> dict[str, tuple[int, ...]]:
        length = self.row_length(linears)
        return {
            "rows": (
                sum(self.rank * (lin.in_features + lin.out_features) for lin in linears) // length,
                length,
            )
        }

    def topk_shape(self, rows: int) -> tuple[int, int, int] | None:
        return None


def _kind_faults(spec: VBLoRASpec | LoRASpec) -> Iterator[str]:
    """Settings that are not numbers of their kind, such as a rank of 4.5 or of "4"."""
    for entry in fields(spec):
        value, whole = getattr(spec, entry.name), isinstance(entry.default, int)
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            expected = "a whole number" if whole else "a number"
            yield f"{entry.name.replace('_', '-')} is {value!r}, expected {expected}"


AdapterSpec = VBLoRASpec | LoRASpec
ADAPTERS: Mapping[str, type[VBLoRASpec | LoRASpec]] = {"vblora": VBLoRASpec, "lora": LoRASpec}


@dataclass(frozen=True)
class Blueprint:
    """Everything that gives the numbers of a state their meaning. Two sites with one fingerprint can average.

    Attributes:
        spec: the adapter.
        linears: adapted layers, in the order of their rows.
        head: trained tensors of the task head, in the order of the flat section "head"; empty without one.
        model: architecture of the base, as `model_type` and sizes; not its name, which differs between sites.
        labels: label names by class index; empty for language modelling.
    """

    spec: AdapterSpec
    linears: tuple[Linear, ...]
    head: tuple[HeadTensor, ...] = ()
    model: str = ""
    labels: tuple[str, ...] = ()

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
        """(S, k, h) where rows are chosen from a bank, else None."""
        return self.spec.topk_shape(self.rows)

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
        body = {
            "spec": spec,
            "linears": linears,
            "head": head,
            "model": self.model,
            "labels": list(self.labels),
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Blueprint:
        """Read `to_json`'s text.

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
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, ConfigError) as error:
            raise ModelError(f"blueprint: not readable ({type(error).__name__}: {error})") from error


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
