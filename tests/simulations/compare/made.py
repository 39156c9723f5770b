"""Runs that nobody trained: curves with known ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simulations.adapters import parse_adapters
from simulations.compare.protocol import Protocol, contenders
from simulations.compare.results import Comparison, Result, compared
from simulations.compare.study import Outcome, Trial
from simulations.config import default_config


def made_result(seed: int, scores: Sequence[float], round_bytes: int, **sections: float) -> Result:
    """A run evaluated every round; the first score is that of round 0."""
    curve = tuple((number, number * round_bytes, score) for number, score in enumerate(scores))
    last = list(scores[1:][-3:])
    return Result(
        seed=seed,
        start=scores[0],
        final=scores[-1],
        best=max(scores),
        last3=sum(last) / len(last),
        curve=curve,
        up=round_bytes / 2,
        down=round_bytes / 2,
        total=curve[-1][1],
        sections=sections or {"rows": round_bytes / 2 - 100, "frame": 100.0},
        trained=100,
        sent=10,
        seconds=12.5,
        averaged=len(last),
        memory=500_000_000,
    )


def made_comparison() -> Comparison:
    """LoRA in float32 and through the codec, VB-LoRA two points behind; two seeds."""
    rise = [0.5, 0.7, 0.8, 0.8, 0.8]
    return compared(
        {
            "vblora": [made_result(seed, [x - 0.02 for x in rise], 1000) for seed in (1, 0)],
            "lora:8 float32": [made_result(seed, rise, 100_000) for seed in (0, 1)],
            "lora:8": [made_result(seed, [x - 0.01 * (seed == 1) for x in rise], 10_000) for seed in (0, 1)],
        },
        "lora:8 float32",
        "accuracy",
    )


def made_outcome(out: Path, tune: int = 1) -> Outcome:
    """All that a report tells of `made_comparison`."""
    base = {**default_config(), "data": "<b>reviews</b>.csv", "partition": "iid"}
    named, baseline = contenders(parse_adapters("vblora,lora:8"), base)
    protocol = Protocol(base, named, baseline, seeds=2, tune=tune, out=out)
    trials = {
        name: tuple(
            Trial(rate, (0.7 + place / 100,) if place else (), place == 2)
            for place, rate in enumerate(contender.values)
        )
        for name, contender in named.items()
    }
    machine = {"device": "CPU", "threads": 1, "at_once": 2, "workers": 1, "versions": {"torch": "2.13.0"}}
    return Outcome(protocol, trials, made_comparison(), machine)
