"""Version 0 of an adapter: the order of each row's logits, seeded or found in a file that both sides hold.

Places of a row are counted in its order (`vblora.candidates`): the bank vectors sorted by their logits at
version 0. Nothing of an order travels. Where a run goes on from an adapter of a file, the blueprint names its
content by a digest, and both sides read the file. Axes: S rows, h bank vectors, k mixed vectors a row, n of
some rows, w first places of an order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from vblora import seeded
from vblora.errors import ModelError, StartError

if TYPE_CHECKING:
    from vblora.adapters import AdapterSpec
    from vblora.spec import Blueprint

__all__ = [
    "LARGEST_LOGIT",
    "ChosenFirst",
    "Content",
    "Found",
    "Order",
    "SeededOrder",
    "SortedOrder",
    "Start",
    "chosen_vectors",
    "order_of",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

LARGEST_LOGIT = 512.0  # in size, at version 0
CHUNK = 1 << 12  # rows drawn at once: some tens of MB at h 2,048


class Order(Protocol):
    """Which bank vector stands at each place of a row, and its logit at version 0, falling along a row."""

    @property
    def exact(self) -> bool:
        """Whether a row as version 0 has it keeps its logits; else its chosen are lifted above the others."""

    def vectors(self, rows: Ints, width: int) -> NDArray[np.int32]:
        """(n, w) bank vectors at the first `width` places of `rows`."""

    def logits(self, rows: Ints, width: int) -> Floats:
        """(n, w) their logits."""

    def fixed(self) -> list[NDArray[np.generic]]:
        """Arrays that the seed does not give, for the digest."""


@dataclass(frozen=True)
class SeededOrder:
    """The order that `vblora.seeded` draws: h normal logits of standard deviation `std` a row."""

    seed: int
    num_vectors: int
    std: float
    exact: bool = False

    def vectors(self, rows: Ints, width: int) -> NDArray[np.int32]:
        return seeded.order(self.seed, rows, self.num_vectors, width)

    def logits(self, rows: Ints, width: int) -> Floats:
        return seeded.values(self.seed, rows, self.num_vectors, width, self.std)

    def fixed(self) -> list[NDArray[np.generic]]:
        return []


@dataclass(frozen=True)
class ChosenFirst:
    """An order known by its first k vectors, `chosen` (S, k): a seeded one with these moved to the front.

    The logits of the places are the seeded ones.
    """

    seeds: SeededOrder
    chosen: NDArray[np.int32]
    exact: bool = False

    def vectors(self, rows: Ints, width: int) -> NDArray[np.int32]:
        first, k = self.chosen[rows], self.chosen.shape[1]
        drawn = self.seeds.vectors(rows, width)
        moved = (drawn[:, :, None] == first[:, None, :]).any(axis=2)
        others = np.argsort(moved, axis=1, kind="stable")[:, : max(0, width - k)]
        return np.concatenate([first[:, :width], np.take_along_axis(drawn, others, axis=1)], axis=1)

    def logits(self, rows: Ints, width: int) -> Floats:
        return self.seeds.logits(rows, width)

    def fixed(self) -> list[NDArray[np.generic]]:
        return [self.chosen]


class SortedOrder:
    """An order known whole, from logits (S, h) in the bank's own order; of equals the lower vector first.

    It takes 6 bytes a logit in memory, 8 where h is above 32,768.
    """

    exact = True

    def __init__(self, logits: Floats) -> None:
        h = logits.shape[1]
        kind = np.int16 if h <= 1 << 15 else np.int32
        self._vectors = np.empty(logits.shape, kind)
        self._logits = np.empty(logits.shape, np.float32)
        step = max(1, (1 << 22) // h)  # rows sorted at once: some tens of MB
        for start in range(0, len(logits), step):
            part = logits[start : start + step]
            places = np.argsort(-part, axis=1, kind="stable")
            self._vectors[start : start + step] = places
            self._logits[start : start + step] = np.take_along_axis(part, places, axis=1)

    def vectors(self, rows: Ints, width: int) -> NDArray[np.int32]:
        return self._vectors[rows, :width].astype(np.int32)

    def logits(self, rows: Ints, width: int) -> Floats:
        return self._logits[rows, :width]

    def fixed(self) -> list[NDArray[np.generic]]:
        return [self._vectors, self._logits]


@dataclass(frozen=True)
class Content:
    """Version 0 of an adapter that was found in a file.

    Attributes:
        dense: sections by name, shapes as in `Blueprint.dense_shapes`; without `head` that is seeded.
        order: of each row, where rows are chosen from a bank.
        gaps: (S, k - 1) of the first k places of each row, likewise.
    """

    dense: Mapping[str, Floats]
    order: Order | None = None
    gaps: Floats | None = None

    def digest(self) -> str:
        """32 hexadecimal digits that name this exact content."""
        found = hashlib.sha256()
        arrays = [(name, self.dense[name]) for name in sorted(self.dense)]
        if self.order is not None and self.gaps is not None:
            arrays.append(("gaps", self.gaps))
            arrays += [(f"order{number}", array) for number, array in enumerate(self.order.fixed())]  # type: ignore[misc]
        for name, array in arrays:
            found.update(f"{name}{array.shape}".encode())
            found.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).data)
        return found.hexdigest()[:32]


@dataclass(frozen=True)
class Start:
    """What a run goes on from in place of the seed.

    Attributes:
        digest: of the content.
        content: None where only its name is known.
    """

    digest: str
    content: Content | None = field(default=None, compare=False, repr=False)

    @property
    def held(self) -> Content:
        """The content.

        Raises:
            ModelError: only its name is known.
        """
        if self.content is None:
            raise ModelError(
                f"start: the adapter goes on from another, {self.digest[:12]}, which is not held here; "
                "name its folder with --start"
            )
        return self.content


@dataclass(frozen=True)
class Found:
    """An adapter of a file.

    Attributes:
        where: the folder, for messages.
        spec: its kind and numbers.
        layers: names of the layers that it adapts.
        read: gives version 0 for a blueprint of these layers.
    """

    where: str
    spec: AdapterSpec
    layers: frozenset[str]
    read: Callable[[Blueprint], Content]

    def started(self, blueprint: Blueprint) -> Blueprint:
        """`blueprint` with this adapter as its version 0.

        Raises:
            StartError: it has other numbers, layers or shapes.
        """
        names = {linear.name for linear in blueprint.linears}
        if blueprint.spec != self.spec:
            raise StartError(f"start {self.where}: it is {self.spec}, expected {blueprint.spec}")
        if absent := sorted(self.layers ^ names):
            raise StartError(
                f"start {self.where}: it adapts {len(self.layers)} layers, {len(names)} were expected; "
                f"{absent[0]} is not in both; is the base the one that it was trained on?"
            )
        content = self.read(blueprint)
        return replace(blueprint, start=Start(content.digest(), content))


def order_of(blueprint: Blueprint) -> Order:
    """The order of each row of an adapter with a bank.

    Raises:
        ModelError: it has none, or goes on from a file that is not held.
    """
    spec = blueprint.spec
    if spec.kind not in ("vblora", "bank-only"):
        raise ModelError(f"adapter {spec.kind} has no bank to mix rows from")
    if blueprint.start is None:
        return SeededOrder(spec.seed, spec.num_vectors, spec.init_std)  # type: ignore[union-attr]
    order = blueprint.start.held.order
    assert order is not None
    return order


def chosen_vectors(order: Order, positions: NDArray[np.int32]) -> NDArray[np.int32]:
    """(S, k) bank vectors at places (S, k) of each row."""
    found = np.empty_like(positions)
    for start in range(0, len(positions), CHUNK):
        places = positions[start : start + CHUNK]
        rows = np.arange(start, start + len(places))
        drawn = order.vectors(rows, int(places.max(initial=0)) + 1)
        found[start : start + CHUNK] = np.take_along_axis(drawn, places.astype(np.int64), axis=1)
    return found
