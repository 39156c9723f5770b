"""Scores over seeds: means and spreads, paired differences, bytes to a target. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Interval",
    "Reached",
    "Spread",
    "bytes_to_target",
    "is_reached",
    "paired",
    "reached",
    "spread",
    "target_of",
]

Point = tuple[float, float]  # bytes so far, score

# Student's t, 97.5%, by degrees of freedom from 1.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Z_975 = 1.959964
ROUNDING = 1e-9  # of a mean of equal scores


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample; None of one) over n seeds."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Interval:
    """A mean difference over n seeds and its 95% interval by Student's t; no interval of one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def shows_difference(self) -> bool:
        """Whether 0 lies outside."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Reached:
    """How many of n seeds reached a target, and the median of the bytes that it took, one that occurred.

    A seed that did not reach it counts as infinitely many, so the median is None where half did not. Beside
    the n are seeds of which bytes tell nothing: `at_start`, whose target was met before any training.
    """

    count: int
    n: int
    median: float | None
    at_start: int = 0


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of at least one value."""
    return Spread(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Mean of `ours - theirs` over the seeds that both have; None where they share none."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Interval(mean, None, None, 1)
    half = t_975(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def target_of(score: float, share: float, higher_is_better: bool) -> float:
    """The score that is `share` as good as another: that part of an accuracy; of a loss, the loss over it."""
    return score * share if higher_is_better else score / share


def bytes_to_target(curve: Sequence[Point], target: float, higher_is_better: bool) -> float | None:
    """Bytes sent until the first evaluation at least as good as the target; None where none is."""
    for sent, score in curve:
        if is_reached(score, target, higher_is_better):
            return sent
    return None


def is_reached(score: float, target: float, higher_is_better: bool) -> bool:
    """Whether a score is at least as good as a target."""
    return score >= target - ROUNDING if higher_is_better else score <= target + ROUNDING


def reached(bytes_taken: Sequence[float | None], at_start: int = 0) -> Reached:
    """Sum up `bytes_to_target` over seeds; of an even number the median is the higher one in the middle."""
    taken = [math.inf if sent is None else sent for sent in bytes_taken]
    middle = statistics.median_high(taken) if taken else math.inf
    count = sum(math.isfinite(sent) for sent in taken)
    return Reached(count, len(taken), middle if math.isfinite(middle) else None, at_start)


def t_975(freedom: int) -> float:
    """97.5% quantile of Student's t: a table up to 30 degrees of freedom, a series above."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
