"""The kinds of adapter: the numbers that define each, and how a short text names one.

Every kind trains dense tensors, `dense_shapes`, from which a row source (`vblora.sources`) makes the S rows
of length b; VB-LoRA trains a selection beside. Axes: S rows, b row length, h bank vectors, k mixed vectors a
row, r rank, d length of theta, L linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

from vblora.errors import ConfigError, raise_faults

if TYPE_CHECKING:
    from vblora.spec import Linear

__all__ = [
    "ADAPTERS",
    "MAX_SEED",
    "AdapterSpec",
    "BankOnlySpec",
    "FFALoRASpec",
    "LoRASpec",
    "LoRAXSSpec",
    "UniLoRASpec",
    "VBLoRASpec",
    "parse_adapter",
]

MAX_SEED = 1 << 62
Linears = tuple["Linear", ...]
Shapes = dict[str, tuple[int, ...]]

# What a number is called, the least and the most that it may be, and how that is told.
LIMITS: Mapping[str, tuple[str, float, float, str]] = {
    "rank": ("rank", 1, 1024, "1 to 1024"),
    "num_vectors": ("num-vectors (h)", 1, 1 << 20, f"1 to {1 << 20}"),
    "vector_length": ("vector-length (b)", 1, 65536, "1 to 65536"),
    "topk": ("topk (k)", 1, 64, "1 to 64"),
    "theta_length": ("theta-length (d)", 1, 1 << 28, f"1 to {1 << 28}"),
    "alpha": ("alpha", 1e-300, 65536, "above 0, at most 65536"),
    "init_std": ("init-std", 1e-300, 10, "above 0, at most 10"),
    "bank_bound": ("bank-bound", 1e-300, 10, "above 0, at most 10"),
    "theta_bound": ("theta-bound", 1e-300, 10, "above 0, at most 10"),
    "margin": ("margin", 1e-4, 10, "0.0001 to 10 (0 would tie a chosen logit with the next)"),
    "seed": ("seed", 0, MAX_SEED - 1, "0 to 2^62 - 1"),
}


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
    scaling: ClassVar[float] = 1.0
    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_std: float = 0.1
    bank_bound: float = 0.02
    margin: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("adapter vblora", _faults(self))

    def row_length(self, linears: Linears) -> int:
        return self.vector_length

    def dense_shapes(self, linears: Linears) -> Shapes:
        return {"bank": (self.num_vectors, self.vector_length)}


@dataclass(frozen=True)
class BankOnlySpec:
    """VB-LoRA whose selection stays as the seed draws it: only the bank is trained, and nothing else travels.

    Attributes: as those of `VBLoRASpec`.
    """

    kind: ClassVar[str] = "bank-only"
    scaling: ClassVar[float] = 1.0
    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_std: float = 0.1
    bank_bound: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("adapter bank-only", _faults(self))

    def row_length(self, linears: Linears) -> int:
        return self.vector_length

    def dense_shapes(self, linears: Linears) -> Shapes:
        return {"bank": (self.num_vectors, self.vector_length)}


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
        raise_faults("adapter lora", _faults(self))

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def row_length(self, linears: Linears) -> int:
        return _whole_rows(linears)

    def dense_shapes(self, linears: Linears) -> Shapes:
        length = _whole_rows(linears)
        return {"rows": (_entries(linears, self.rank) // length, length)}


@dataclass(frozen=True)
class FFALoRASpec:
    """FFA-LoRA (arXiv 2403.12313): A stays as the seed draws it, B is trained. The mean of B A is then exact.

    Attributes: as those of `LoRASpec`; the section `rows` holds the rows of B alone, layer after layer.
    """

    kind: ClassVar[str] = "ffa-lora"
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("adapter ffa-lora", _faults(self))

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def row_length(self, linears: Linears) -> int:
        return _whole_rows(linears)

    def dense_shapes(self, linears: Linears) -> Shapes:
        length = _whole_rows(linears)
        return {"rows": (self.rank * sum(lin.out_features for lin in linears) // length, length)}


@dataclass(frozen=True)
class LoRAXSSpec:
    """LoRA-XS (arXiv 2405.17604): `W + B R A` with R (r, r) trained, B and A the base's own singular factors.

    With W = U S V^T, B is the first r columns of U and A those of V, times S, transposed, as in the authors'
    code. R starts at zero (theirs at a standard deviation of 1e-5).

    Attributes:
        rank: r, at most the shorter side of every layer.
        seed: of nothing but the task head: the factors are the base's.
    """

    kind: ClassVar[str] = "lora-xs"
    scaling: ClassVar[float] = 1.0
    rank: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("adapter lora-xs", _faults(self))

    def row_length(self, linears: Linears) -> int:
        return _whole_rows(linears)

    def dense_shapes(self, linears: Linears) -> Shapes:
        return {"cores": (len(linears), self.rank, self.rank)}


@dataclass(frozen=True)
class UniLoRASpec:
    """Uni-LoRA (arXiv 2506.00799): every entry of every A and B reads one vector theta at a seeded place.

    An entry that reads place j is `theta[j] / sqrt(n_j)`, n_j the entries that read it: the map from theta to
    the entries keeps lengths.

    Attributes:
        rank: r of every pair of factors.
        theta_length: d, numbers that are trained.
        theta_bound: theta starts uniform in (-theta_bound, theta_bound).
        seed: of theta and of the places, which never travel.
    """

    kind: ClassVar[str] = "uni-lora"
    scaling: ClassVar[float] = 1.0
    rank: int = 4
    theta_length: int = 32768
    theta_bound: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("adapter uni-lora", _faults(self))

    def row_length(self, linears: Linears) -> int:
        return _whole_rows(linears)

    def dense_shapes(self, linears: Linears) -> Shapes:
        return {"theta": (self.theta_length,)}


AdapterSpec = VBLoRASpec | BankOnlySpec | LoRASpec | FFALoRASpec | LoRAXSSpec | UniLoRASpec
ADAPTERS: Mapping[str, type[AdapterSpec]] = {
    spec.kind: spec for spec in (VBLoRASpec, LoRASpec, FFALoRASpec, LoRAXSSpec, UniLoRASpec, BankOnlySpec)
}
NUMBERS: Mapping[str, str] = {  # of the text form: the option that the number after the colon stands for
    "vblora": "num-vectors",
    "lora": "rank",
    "ffa-lora": "rank",
    "lora-xs": "rank",
    "uni-lora": "theta-length",
    "bank-only": "num-vectors",
}


def parse_adapter(text: str) -> dict[str, str | int]:
    """Read `KIND` or `KIND:NUMBER` into options of a run: `lora:8` is `{"adapter": "lora", "rank": 8}`.

    The number is the rank, or theta's length (uni-lora), or h (vblora, bank-only); without one the size is
    the kind's own.

    Raises:
        ConfigError: an unknown kind, or what is no number of it.
    """
    kind, colon, number = text.strip().partition(":")
    where = f"adapter {text!r:.60}"
    if kind not in ADAPTERS:
        raise ConfigError(
            f"{where}: kind is {kind!r:.40}, expected one of {', '.join(ADAPTERS)}, "
            "alone or with a number, as lora:8"
        )
    if not colon:
        return {"adapter": kind}
    option = NUMBERS[kind]
    _, least, most, told = LIMITS[option.replace("-", "_")]
    if not (number.isascii() and number.isdigit()) or not least <= int(number) <= most:
        raise ConfigError(f"{where}: {option} is {number!r:.40}, expected {told}, as {kind}:32")
    return {"adapter": kind, option: int(number)}


def _faults(spec: Any) -> Iterator[str]:
    """What is wrong with the numbers of a spec: first those that are no numbers of their kind, if any."""
    wrong = list(_kind_faults(spec))
    if wrong:
        yield from wrong
        return
    for entry in fields(spec):
        name, least, most, told = LIMITS[entry.name]
        value = getattr(spec, entry.name)
        if not least <= value <= most:
            yield f"{name} is {value}, expected {told}"
        elif entry.name == "topk" and value > spec.num_vectors >= 1:
            yield f"{name} is {value}, the bank has num-vectors (h) {spec.num_vectors}; choose k <= h"


def _kind_faults(spec: Any) -> Iterator[str]:
    """Settings that are not numbers of their kind, such as a rank of 4.5 or of "4"."""
    for entry in fields(spec):
        value, whole = getattr(spec, entry.name), isinstance(entry.default, int)
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            expected = "a whole number" if whole else "a number"
            yield f"{entry.name.replace('_', '-')} is {value!r}, expected {expected}"


def _whole_rows(linears: Linears) -> int:
    """The largest length that divides every side, so no row is cut and nothing is trained in vain."""
    return math.gcd(*(side for lin in linears for side in (lin.in_features, lin.out_features)))


def _entries(linears: Linears, rank: int) -> int:
    """Numbers in all A and B."""
    return sum(rank * (lin.in_features + lin.out_features) for lin in linears)
