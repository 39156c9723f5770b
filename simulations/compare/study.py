"""A comparison from its options to its files: plan, choose rates, train, tell."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fl_server.plot import read_history
from simulations.compare.board import Board
from simulations.compare.probe import Probe, look_ahead, share_out
from simulations.compare.protocol import GRID, Planned, Protocol
from simulations.compare.results import Comparison, Result, compared, result_of, trace
from simulations.compare.running import MEASURED, Layout, check_existing, is_finished, run_all
from simulations.compare.tables import verdict
from simulations.config import check_config
from simulations.units import duration
from vblora.errors import RunError

__all__ = ["Outcome", "Trial", "best_rate", "compare", "tried_rates"]


@dataclass(frozen=True)
class Trial:
    """A rate that was tried.

    Attributes:
        rate: of the contender's main tensor.
        scores: last3 on the validation split, by seed; empty where a run could not be finished.
        chosen: whether it is the one that the comparison was run with.
    """

    rate: float
    scores: tuple[float, ...]
    chosen: bool


@dataclass(frozen=True)
class Outcome:
    """All that a report tells.

    Attributes:
        protocol: what was asked for.
        trials: of each contender; one of each, without scores, where the rates were taken as they are.
        comparison: of the final runs.
        machine: device and layout of the first run; versions.
    """

    protocol: Protocol
    trials: Mapping[str, tuple[Trial, ...]]
    comparison: Comparison
    machine: Mapping[str, Any]

    @property
    def verdict(self) -> list[str]:
        """What the figures say, and whether rates were tuned."""
        untuned = "Rates were not tuned: each adapter trained at its default, or at the one that was given."
        return [*verdict(self.comparison), *[untuned] * (not self.protocol.tune)]


def compare(protocol: Protocol, console: Console, at_once: int = 0) -> Outcome:
    """Train what is not yet there, and read what is.

    Args:
        protocol: see there.
        console: told the plan before it starts, and each run.
        at_once: runs at a time; 0 leaves it to `share_out`.

    Raises:
        FedVBError: a config cannot work, what lies there is another comparison, or a run of the comparison
            itself could not be finished.
        KeyboardInterrupt: what is finished stays.
    """
    for contender in protocol.contenders.values():
        check_config({**protocol.base, **contender.keys})
    tuning = protocol.tuning_runs()
    expected = protocol.final_runs({name: one.default for name, one in protocol.contenders.items()})
    check_existing([*tuning, *expected])
    left = [run for run in tuning if not is_finished(run)]
    if not left:
        expected = protocol.final_runs(_rates(tried_rates(protocol, tuning)))
    left += [run for run in expected if not is_finished(run)]
    trials = _train(protocol, tuning, len(left), console, at_once) if left else tried_rates(protocol, tuning)
    final = protocol.final_runs(_rates(trials))
    groups: dict[str, list[Result]] = {}
    for run in final:
        groups.setdefault(run.contender, []).append(_read(run))
    summary = _loaded(final[0].out / "summary.json")
    metric = summary["score"]["metric"]
    machine = {**_loaded(final[0].out / MEASURED), "versions": summary["versions"]["client"]}
    return Outcome(protocol, trials, compared(groups, protocol.baseline, metric), machine)


def _train(
    protocol: Protocol, tuning: Sequence[Planned], left: int, console: Console, at_once: int
) -> dict[str, tuple[Trial, ...]]:
    """Look ahead, tell what is to come, and finish all runs; gives the rates that were tried."""
    configs = [{**protocol.base, **contender.keys} for contender in protocol.contenders.values()]
    with console.status("loading data and model, timing a few steps"):
        probe = look_ahead(configs)
    layout, seconds = share_out(probe, left, protocol.base, at_once)
    _tell(console, protocol, probe, len(tuning), left, layout, seconds)
    with Board(console, left, seconds) as board:
        failed = {failure.run: failure.reason for failure in run_all(tuning, layout, board)}
        trials = tried_rates(protocol, [run for run in tuning if run not in failed], failed)
        final = protocol.final_runs(_rates(trials))
        check_existing(final)
        if failures := run_all(final, layout, board):
            told = "; ".join(f"{failure.run.label}: {failure.reason}" for failure in failures)
            raise RunError(f"compare: {len(failures)} of {len(final)} runs could not be finished: {told}")
    return trials


def _tell(
    console: Console,
    protocol: Protocol,
    probe: Probe,
    tuning: int,
    left: int,
    layout: Layout,
    seconds: float,
) -> None:
    """What is about to happen."""
    names = list(protocol.contenders)
    first, last = int(protocol.base["seed"]), int(protocol.base["seed"]) + protocol.seeds - 1
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    rates = "as they are (--tune 1 would try three of each on a part of the training texts)"
    if tuning:
        rates = f"{tuning} runs try {len(GRID)} of each on a part of the training texts, then one is kept"
    all_runs = tuning + len(names) * protocol.seeds
    there = f", {all_runs - left} of {all_runs} are there" if left < all_runs else ""
    how = f"{layout.at_once} at a time"
    how += f", {layout.workers} processes each" if layout.workers > 1 else ""
    facts = {
        **probe.facts,
        "compare": f"{', '.join(names)}; {seeds}",
        "rates": rates,
        "work": f"{left} runs of {protocol.base['rounds']} rounds{there}; {how}: about {duration(seconds)}",
        "out": str(protocol.out),
    }
    for name, fact in facts.items():
        console.print(f"{name:<9}{fact}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def tried_rates(
    protocol: Protocol, finished: Sequence[Planned], failed: Mapping[Planned, str] | None = None
) -> dict[str, tuple[Trial, ...]]:
    """The rates that were tried, and of each contender the best; its default where none was tried.

    Raises:
        RunError: none of a contender's could be finished.
    """
    found: dict[str, tuple[Trial, ...]] = {}
    for name, contender in protocol.contenders.items():
        if not protocol.tune:
            found[name] = (Trial(contender.default, (), chosen=True),)
            continue
        scores = {
            rate: tuple(
                float(_loaded(run.out / "summary.json")["score"]["last3"])
                for run in finished
                if (run.contender, run.rate) == (name, rate)
            )
            for rate in contender.values
        }
        whole = {rate: statistics.fmean(own) for rate, own in scores.items() if len(own) == protocol.tune}
        if not whole:
            reason = next((reason for run, reason in (failed or {}).items() if run.contender == name), "")
            raise RunError(
                f"compare: none of the rates {', '.join(f'{rate:g}' for rate in contender.values)} of {name} "
                f"could be tried to the end: {reason}"
            )
        best = best_rate(whole, contender.default, _higher(finished))
        found[name] = tuple(
            Trial(rate, scores[rate] if rate in whole else (), rate == best) for rate in contender.values
        )
    return found


def best_rate(scores: Mapping[float, float], default: float, higher_is_better: bool) -> float:
    """The rate of the best score; of several as good, the one nearest to the default."""
    sign = 1 if higher_is_better else -1
    return max(scores, key=lambda rate: (sign * scores[rate], -abs(math.log(rate / default))))


def _rates(trials: Mapping[str, Sequence[Trial]]) -> dict[str, float]:
    return {name: next(trial.rate for trial in tried if trial.chosen) for name, tried in trials.items()}


def _higher(finished: Sequence[Planned]) -> bool:
    return bool(_loaded(finished[0].out / "summary.json")["score"]["metric"] != "loss")


def _read(run: Planned) -> Result:
    measured = _loaded(run.out / MEASURED)
    traced = trace(read_history(run.out))
    return result_of(
        _loaded(run.out / "summary.json"), traced, memory=measured["memory"], gpu=measured["gpu"]
    )


def _loaded(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: not readable ({error}); remove its folder to train that run again"
        ) from error
    return content
