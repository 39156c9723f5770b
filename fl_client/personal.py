"""What stays with a client: its task head, its choice of bank vectors, or both. The rest is shared.

A personal part is loaded into its client's tensors before training and kept afterwards; in the update that
part is left as the reference has it, so nothing of it is sent, and the shared state keeps what the seed drew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.errors import raise_faults
from vblora.spec import Blueprint
from vblora.state import State, TopK, Update

__all__ = ["Part", "PersonalSettings", "keep_back", "with_part"]

HEAD, LOGITS = "head", "logits"


@dataclass(frozen=True)
class PersonalSettings:
    """What is not shared.

    Attributes:
        personal: none, head, logits, or head,logits.
    """

    personal: str = "none"

    def __post_init__(self) -> None:
        raise_faults("personal", self._faults())

    @property
    def parts(self) -> frozenset[str]:
        """Names among head and logits."""
        named = {part.strip() for part in self.personal.split(",")}
        return frozenset() if named == {"none"} else frozenset(named)

    def check(self, blueprint: Blueprint) -> None:
        """See that the adapter has what is asked for.

        Raises:
            ConfigError: it has no logits, or no head.
        """
        raise_faults("personal", self._misfits(blueprint))

    def _faults(self) -> Iterator[str]:
        if unknown := self.parts - {HEAD, LOGITS}:
            yield (
                f"personal is {self.personal!r}, expected none, head, logits or head,logits"
                f" (not {', '.join(map(repr, sorted(unknown)))})"
            )

    def _misfits(self, blueprint: Blueprint) -> Iterator[str]:
        kind = blueprint.spec.kind
        if LOGITS in self.parts and blueprint.topk_shape is None:
            yield f"personal is {self.personal}, but a {kind} adapter has no logits; expected none or head"
        if HEAD in self.parts and not blueprint.head_size:
            yield f"personal is {self.personal}, but causal-lm trains no task head; expected none or logits"


@dataclass(frozen=True)
class Part:
    """What one client keeps for itself.

    Attributes:
        head: (head_size,) float32, or None where the head is shared.
        topk: its selection, or None where that is shared.
    """

    head: NDArray[np.float32] | None = None
    topk: TopK | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For a file: places in as few bytes as they need."""
        found: dict[str, NDArray[Any]] = {} if self.head is None else {"head": self.head}
        if self.topk is not None:
            kind = np.min_scalar_type(int(self.topk.positions.max(initial=0)))
            found |= {"positions": self.topk.positions.astype(kind), "gaps": self.topk.gaps}
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Part:
        """Read what `arrays` gave."""
        topk = None
        if "positions" in arrays:
            topk = TopK(arrays["positions"].astype(np.int32), arrays["gaps"])
        return cls(arrays.get("head"), topk)


def with_part(reference: State, part: Part | None) -> State:
    """The state that a client has: the reference, its own part put in; for an unseen one the reference."""
    if part is None:
        return reference
    dense = reference.dense if part.head is None else {**reference.dense, HEAD: part.head}
    return replace(reference, dense=dense, topk=reference.topk if part.topk is None else part.topk)


def keep_back(update: Update, start: State, reference: State, parts: frozenset[str]) -> tuple[Update, Part]:
    """Part an update into what is sent and what stays.

    Args:
        update: of one client, against `start`.
        start: what it trained from, `with_part(reference, ...)`.
        reference: the shared state.
        parts: of `PersonalSettings`.

    Returns:
        The update with the personal sections as the reference has them, and the client's part after training.
    """
    head = topk = None
    public = update
    if HEAD in parts:
        head = start.dense[HEAD] + update.dense[HEAD]
        public = replace(public, dense={**public.dense, HEAD: np.zeros_like(head)})
    if LOGITS in parts:
        topk = update.topk
        public = replace(public, topk=reference.topk)
    return public, Part(head, topk)
