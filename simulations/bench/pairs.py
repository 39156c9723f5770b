"""Settings of a study against one of them, seed by seed: by how much scores differ, and how sure that is.

    python -m simulations.bench.pairs results.json --against wire=lossless
    python -m simulations.bench.pairs results.json --against wire-up-bits=32 --plot curve.png

reads what `simulations.bench.learning --json` wrote, and prints Markdown. A seed draws the texts, their
deal, the clients of each round and all initial values, so runs of one seed differ by their settings alone,
and their difference scatters less than either score.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.bench.origin import read_results
from simulations.compare.scores import Interval, paired
from simulations.compare.tables import markdown
from simulations.units import size
from vblora.errors import FedVBError, RunError

__all__ = ["Pairing", "main", "pair"]

Result = dict[str, Any]
Setting = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Pairing:
    """One setting beside the one that it is held against.

    Attributes:
        setting: what differs from other settings of the study, as (key, value).
        mean: of its scores.
        difference: to the other setting, over seeds that both have.
        up, total: bytes that a client sent in a round; of all clients in both directions. Means.
        metric: "accuracy" or "loss".
    """

    setting: Setting
    mean: float
    difference: Interval
    up: float
    total: float
    metric: str

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.setting) or "as the study's base"

    @property
    def half(self) -> float | None:
        """Half the width of the interval; None of one seed."""
        return None if self.difference.high is None else self.difference.high - self.difference.mean


def pair(results: list[Result], against: Mapping[str, str], score: str = "last3") -> list[Pairing]:
    """Every setting beside the one that `against` names, which comes first; others by their bytes.

    Args:
        results: runs.
        against: keys of a config and what they are in that setting.
        score: "last3", "best" or another of a summary's.

    Raises:
        RunError: no setting, or several, are so; or some run has no such score.
    """
    if missing := [run for run in results if score not in run["score"]]:
        raise RunError(f"results: {len(missing)} of {len(results)} runs have no score {score!r}")
    groups: dict[Setting, dict[int, Result]] = {}
    for result in results:
        setting = _setting(result["config"])
        groups.setdefault(setting, {})[int(result["config"]["seed"])] = result
    named = [setting for setting in groups if _is(dict(setting), against)]
    if len(named) != 1:
        raise RunError(f"results: {len(named)} settings have {dict(against)}, expected one of {len(groups)}")
    common = set.intersection(*map(set, groups))
    other = {seed: run["score"][score] for seed, run in groups[named[0]].items()}
    found = []
    for setting, runs in groups.items():
        scores = {seed: run["score"][score] for seed, run in runs.items()}
        difference = paired(scores, other)
        if difference is not None:
            sent = [run["bytes"] for run in runs.values()]
            up = statistics.mean(one["up_per_client_round"] for one in sent)
            total = statistics.mean(one["up_total"] + one["down_total"] for one in sent)
            differing = tuple(item for item in setting if item not in common)
            mean, metric = statistics.mean(scores.values()), str(next(iter(runs.values()))["score"]["metric"])
            found.append((setting != named[0], up, Pairing(differing, mean, difference, up, total, metric)))
    return [pairing for *_, pairing in sorted(found, key=lambda item: item[:2])]


def _table(pairings: list[Pairing], score: str) -> str:
    """The pairings as Markdown: accuracies in points, losses as they are."""
    metric = pairings[0].metric
    factor, places = (100, 2) if metric == "accuracy" else (1, 4)
    cells = [
        [
            str(item),
            str(item.difference.n),
            f"{factor * item.mean:.{places}f}",
            f"{factor * item.difference.mean:+.{places}f}".replace("-", "−"),
            "" if item.half is None else f"± {factor * item.half:.{places}f}",
            size(item.up),
            size(item.total),
        ]
        for item in pairings
    ]
    return markdown(["setting", "seeds", f"{metric}, {score}", "difference", "95%", "up", "in all"], cells)


def plot(pairings: list[Pairing], target: Path) -> None:
    """Differences by bits of a number going up, with and without error feedback.

    Raises:
        RunError: no setting names them, with two seeds or more.
    """
    curves = {feedback: _by_bits(pairings, feedback) for feedback in ("off", "on")}
    if not any(curves.values()):
        raise RunError("--plot: no setting has wire-up-bits and two seeds or more; there is no curve to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for feedback, points in curves.items():
        if not points:
            continue
        bits, means, halves = zip(*points, strict=True)
        axes.errorbar(bits, means, yerr=halves, marker="o", capsize=3, label=f"feedback {feedback}")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bits of a number going up")
    axes.set_ylabel("points against float32, 95% interval over seeds")
    axes.legend()
    figure.savefig(target, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _by_bits(pairings: list[Pairing], feedback: str) -> list[tuple[float, float, float]]:
    """(bits, points of difference, half the width of their interval), rising."""
    return sorted(
        (float(dict(item.setting)["wire-up-bits"]), 100 * item.difference.mean, 100 * item.half)
        for item in pairings
        if dict(item.setting).get("wire-feedback", "off") == feedback
        and dict(item.setting).get("wire-up-bits")
        and item.half is not None
    )


def _setting(config: Mapping[str, Any]) -> Setting:
    return tuple(sorted((name, value) for name, value in config.items() if name != "seed"))


def _is(config: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    return all(str(config.get(name)) == value for name, value in wanted.items())


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and draw the curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="files of bench.learning --json")
    parser.add_argument("--against", required=True, help="KEY=VALUE,... of the setting to compare with")
    parser.add_argument("--score", default="last3", help="last3 or best")
    parser.add_argument("--plot", type=Path, help="draw differences by wire-up-bits into this file")
    given = parser.parse_args(arguments)
    try:
        against = dict(item.split("=", 1) for item in given.against.split(","))
    except ValueError:
        parser.error(f"--against {given.against}: expected KEY=VALUE, more by comma")
    try:
        pairings = pair(read_results(given.results), against, given.score)
        print(f"{given.score} against {given.against}, paired by seed\n\n{_table(pairings, given.score)}")
        if given.plot:
            plot(pairings, given.plot)
    except FedVBError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
