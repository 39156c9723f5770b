"""Clients that fail or lag, on purpose: what a simulation does to some of them, drawn from the seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vblora.errors import raise_faults

__all__ = ["Fate", "HazardSettings"]

STREAM = 0x4A2  # keeps these draws apart from the draws of batches


@dataclass(frozen=True)
class Fate:
    """What happens to one client in one round: it drops out, or takes `steps` local steps."""

    dropped: bool
    steps: int


@dataclass(frozen=True)
class HazardSettings:
    """How often clients fail. Both are 0 in a deployment, where nobody needs to simulate them.

    Attributes:
        dropout: chance that a sampled client gives no update. It says so at once, and nobody waits for a
            deadline: the history names it under `dropped`, and the round goes on without it.
        stragglers: chance that one is stopped early, after 1 to all but one of its steps.
    """

    dropout: float = 0.0
    stragglers: float = 0.0

    def __post_init__(self) -> None:
        raise_faults("hazards", self._faults())

    def _faults(self) -> Iterator[str]:
        if not 0 <= self.dropout < 1:
            yield f"dropout is {self.dropout}, expected 0 to below 1"
        if not 0 <= self.stragglers <= 1:
            yield f"stragglers is {self.stragglers}, expected 0 to 1"

    def fate(self, seed: int, round_number: int, client: int, steps: int) -> Fate:
        """The lot of a client in a round; it depends on these numbers alone."""
        if not self.dropout and not self.stragglers:
            return Fate(False, steps)
        source = np.random.SeedSequence([seed, round_number, client, STREAM])
        drop, lag, when = np.random.Generator(np.random.Philox(source)).random(3)
        if drop < self.dropout:
            return Fate(True, 0)
        if lag < self.stragglers and steps > 1:
            return Fate(False, 1 + int(when * (steps - 1)))
        return Fate(False, steps)
