"""One client against its round: how far updates reach, and how one that reaches too far is cut back.

The pull of an update on a section of the mean is its length there times its examples. No update counts more
than `factor` times the round's median of examples, and a section that pulls more than `factor` times the
median pull is scaled to that: no single client, however it lies, moves a section of the mean further than the
median client does, times `factor`. The weights of a selection need no cutting: each lies in (0, 1], so what
they can do is bounded by the share of examples. Logits have no such bound: settings refuse to clip
where those are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from fl_server.aggregate import Mean
from fl_server.exchange import client_order
from vblora.spec import Blueprint
from vblora.state import State, Update

__all__ = ["Harvest", "clip_updates", "norms"]


def norms(update: Update) -> dict[str, float]:
    """The Euclidean length of each dense section of an update."""
    # Not linalg.norm: BLAS starts threads for it, which go on spinning on cores that helpers need.
    squares = {name: np.square(change, dtype=np.float64).sum() for name, change in update.dense.items()}
    return {name: math.sqrt(square) for name, square in squares.items()}


def clip_updates(updates: Mapping[str, Update], factor: float) -> tuple[dict[str, Update], dict[str, str]]:
    """Cut updates back to `factor` times the round's medians.

    Args:
        updates: of one round, by client; their order does not matter.
        factor: at least 1. With fewer than three updates a median says nothing, and nothing is cut. Nor do
            those that change nothing, as clients of one label do: they are no part of it. Where two change
            a section the smaller pull is the measure, and where one does, its change is dropped.

    Returns:
        The updates, and what was cut of which client, for the log.
    """
    if len(updates) < 3:
        return dict(updates), {}
    most = max(1, int(factor * median(update.examples for update in updates.values())))
    examples = {name: min(update.examples, most) for name, update in updates.items()}
    lengths = {name: norms(update) for name, update in updates.items()}
    limits = {
        part: _limit(factor, [examples[name] * found[part] for name, found in lengths.items()])
        for part in next(iter(lengths.values()))
    }
    kept, told = {}, {}
    for name, update in updates.items():
        allowed = {part: limit / examples[name] for part, limit in limits.items()}
        long = {part: length for part, length in lengths[name].items() if length > allowed[part]}
        cuts = [f"{part} {length:.3g} to {allowed[part]:.3g}" for part, length in long.items()]
        if update.examples > most:
            cuts.append(f"examples {update.examples} to {most}")
        if cuts:
            told[name] = "; ".join(cuts)
        scaled = {
            part: update.dense[part] * np.float32(allowed[part] / length) for part, length in long.items()
        }
        kept[name] = replace(update, dense={**update.dense, **scaled}, examples=examples[name])
    return kept, told


def _limit(factor: float, pulls: Sequence[float]) -> float:
    """`factor` times the median of the pulls that there are; of two the smaller, of one 0."""
    moved = [pull for pull in pulls if pull > 0]
    if len(moved) < 2:
        return 0.0
    return factor * (median(moved) if len(moved) > 2 else min(moved))


class Harvest:
    """The usable updates of a round on their way into the mean; `len` counts them.

    Without clipping each goes into the sums at once, so a round of any size fits into memory; with it they
    wait for the medians.

    Args:
        reference: the state that they were trained from.
        blueprint: of that state.
        factor: see `clip_updates`; 0 cuts nothing.
        space: in which selections are averaged, see `Mean`.
    """

    def __init__(self, reference: State, blueprint: Blueprint, factor: float, space: str = "weights") -> None:
        self._mean = Mean(reference, blueprint, space)
        self._reference, self._blueprint = reference, blueprint
        self._factor = factor
        self._held: dict[str, Update] = {}
        self._norms: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self._norms)

    @property
    def examples(self) -> int:
        """That the updates count for."""
        return self._mean.examples

    def take(self, client: str, update: Update) -> None:
        """Take one update that passed `check_update`.

        Raises:
            UpdateError: it is too large for the sums.
        """
        if self._factor:
            Mean(self._reference, self._blueprint).add(update)  # tells whether it fits
            self._held[client] = update
        else:
            self._mean.add(update)
        self._norms.append(norms(update))

    def finish(self) -> tuple[State, dict[str, str]]:
        """The state after the round, and what was cut of which client."""
        cuts: dict[str, str] = {}
        if self._factor:
            kept, cuts = clip_updates(self._held, self._factor)
            for client in sorted(kept, key=client_order):
                self._mean.add(kept[client])
        return self._mean.finish(), cuts

    def spread(self) -> dict[str, list[float]]:
        """The median and the largest length of each section, before cutting."""
        return {
            name: [median(lengths), max(lengths)]
            for name in (self._norms[0] if self._norms else {})
            if (lengths := [found[name] for found in self._norms])
        }
