"""What the server makes of a round's mean: takes it, or steps towards it with a memory of earlier rounds.

Pure functions of (reference, mean, moments), in float32 and number by number, so a resumed run steps alike.
Selections are taken as they are: a memory of places says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.errors import raise_faults
from vblora.state import State

__all__ = ["OPTIMIZERS", "Moments", "StepSettings", "step_keys", "step_settings", "step_towards"]

Floats = NDArray[np.float32]
Moments = Mapping[str, Floats]

OPTIMIZERS = ("mean", "momentum", "adam")
SECOND, FLOOR = 0.99, 1e-3  # of Adam; the paper's beta2, and tau


@dataclass(frozen=True)
class StepSettings:
    """How far a round moves the shared numbers (arXiv 2003.00295, algorithms 1 and 2).

    Attributes:
        optimizer: "mean" moves by `rate` times the mean change; "momentum" adds `decay` of the last move;
            "adam" divides a decayed mean of changes by the root of that of their squares, number by number.
        rate: scale of a move.
        decay: of what is remembered of earlier changes.
    """

    optimizer: str = "mean"
    rate: float = 1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        raise_faults("server step", self._faults())

    def _faults(self) -> Iterator[str]:
        if self.optimizer not in OPTIMIZERS:
            yield f"server-optimizer is {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}"
        if not 0 < self.rate <= 10:
            yield f"server-rate is {self.rate}, expected above 0, at most 10"
        if not 0 <= self.decay < 1:
            yield f"server-decay is {self.decay}, expected 0 to below 1"


def step_keys() -> dict[str, str | float]:
    """The keys that `step_settings` reads, with their defaults."""
    plain = StepSettings()
    return {f"server-{entry.name}": getattr(plain, entry.name) for entry in fields(plain)}


def step_settings(config: Mapping[str, Any]) -> StepSettings:
    """Read the keys `server-optimizer`, `server-rate` and `server-decay` of a config.

    Raises:
        ConfigError: every one that is wrong.
    """
    given, faults = {}, []
    for entry in fields(StepSettings):
        key, kind = f"server-{entry.name}", type(entry.default)
        value = config.get(key, entry.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            faults.append(f"{key} is {value!r}, expected {'text' if kind is str else 'a number'}")
        given[entry.name] = value
    raise_faults("options", faults)
    return StepSettings(**given)


def step_towards(
    mean: State, reference: State, moments: Moments, settings: StepSettings
) -> tuple[State, Moments]:
    """The next state and what is remembered.

    Args:
        mean: the mean of a round.
        reference: what its clients started from.
        moments: remembered so far, by section ("first/bank", "second/bank"); empty at the start.
        settings: a plain mean of rate 1 gives `mean` back.
    """
    if settings.optimizer == "mean" and settings.rate == 1:
        return mean, {}
    dense: dict[str, Floats] = {}
    kept: dict[str, Floats] = {}
    for name, array in mean.dense.items():
        change = array - reference.dense[name]
        if not change.any():  # nobody trained it: it stays, with what is remembered of it
            dense[name] = reference.dense[name]
            kept |= {key: moments[key] for key in (f"first/{name}", f"second/{name}") if key in moments}
            continue
        if settings.optimizer != "mean":
            first = moments.get(f"first/{name}", np.zeros_like(change))
            weight = 1 - settings.decay if settings.optimizer == "adam" else 1.0
            change = kept[f"first/{name}"] = np.float32(settings.decay) * first + np.float32(weight) * change
        if settings.optimizer == "adam":
            old = moments.get(f"second/{name}", np.zeros_like(change))
            square = np.square(array - reference.dense[name])
            second = kept[f"second/{name}"] = np.float32(SECOND) * old + np.float32(1 - SECOND) * square
            change = change / (np.sqrt(second) + np.float32(FLOOR))
        dense[name] = reference.dense[name] + np.float32(settings.rate) * change
    return replace(mean, dense=dense), kept
