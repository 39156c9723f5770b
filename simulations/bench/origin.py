"""Where a study's results come from: the command, the commit, the device; and rates chosen before."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.bench.rivals import RATES, method_of
from vblora.errors import RunError

__all__ = ["commit_of_code", "read_results", "retold_commands", "with_rates"]

Result = dict[str, Any]
Config = dict[str, Any]
ROOT = Path(__file__).parents[2]


def commit_of_code() -> str:
    """The commit that this code is of, "+" after it where files differ; "" where git cannot tell."""
    try:
        commit = _git("rev-parse", "--short=7", "HEAD")
        return commit + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def retold_commands(study: Path, rates: Sequence[Path]) -> str:
    """The commands that train a study again, a line each, its rates first; no path of this machine."""
    absolute = study.resolve()
    name = absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else Path(study.name)
    before = [
        f"{command} --json {path.name}"
        for path in rates
        for command in dict.fromkeys(
            one["origin"]["command"] for one in read_results([path]) if "origin" in one
        )
    ]
    chosen = "".join(f" --rates {path.name}" for path in rates)
    own = f"python -m simulations.bench.learning {name.as_posix()} --texts texts{chosen}"
    return "\n".join([*before, own])


def read_results(paths: Iterable[Path]) -> list[Result]:
    """The runs of some files of `bench.learning --json` that came to an end.

    Raises:
        RunError: a file that is not such a file.
    """
    found: list[Result] = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: not readable ({error}), expected what --json wrote") from error
        if not isinstance(content, list) or not all(map(_is_run, content)):
            raise RunError(f"{path}: not a list of runs, expected what --json wrote")
        found += content
    return [result for result in found if "error" not in result]


def _is_run(one: Any) -> bool:
    return isinstance(one, dict) and "config" in one and ("error" in one or {"score", "bytes"} <= one.keys())


def with_rates(configs: Sequence[Config], trials: Sequence[Result]) -> list[Config]:
    """Configs at the rates that did best in `trials`, each method on each data set by itself.

    A rate counts where every seed of it came to an end.

    Raises:
        RunError: a trial was scored on other than training texts, trials on one data set differ in more than
            their methods, or a method was not tried.
    """
    seen = {str(trial["config"].get("eval-split", "")) for trial in trials}
    if seen - {"train"}:
        raise RunError(
            f"rates: runs scored on eval-split {', '.join(sorted(repr(name) for name in seen - {'train'}))}, "
            "expected 'train': rates are not chosen on what is compared"
        )
    for data, protocols in _protocols(trials).items():
        if len(protocols) > 1:
            raise RunError(f"rates: {data} was tried in {len(protocols)} ways: {'; '.join(protocols)}")
    tried: dict[str, dict[str, dict[int, Result]]] = {}
    for trial in trials:
        rate = json.dumps({key: value for key, value in trial["config"].items() if key in RATES})
        tried.setdefault(_key(trial["config"]), {}).setdefault(rate, {})[trial["config"]["seed"]] = trial
    best = {key: _best(rates) for key, rates in tried.items()}
    if missing := [config for config in configs if _key(config) not in best]:
        raise RunError(f"rates: {_key(missing[0])} was not tried, expected every method of the study")
    return [{**config, **best[_key(config)]} for config in configs]


def _protocols(trials: Sequence[Result]) -> dict[str, list[str]]:
    """By data set all that its trials share but for seed and method, in words."""
    found: dict[str, list[str]] = {}
    for config in (trial["config"] for trial in trials):
        method = method_of(config)
        rest = {key: value for key, value in sorted(config.items()) if key not in {*method, "seed", "data"}}
        told = ", ".join(f"{key} {value}" for key, value in rest.items())
        ways = found.setdefault(_data(config), [])
        if told not in ways:
            ways.append(told)
    return found


def _data(config: Mapping[str, Any]) -> str:
    return str(config.get("data", "docstrings"))


def _key(config: Mapping[str, Any]) -> str:
    """Data and method, but for the rates."""
    method = {key: value for key, value in method_of(config).items() if key not in RATES}
    return json.dumps({"data": _data(config), **method}, sort_keys=True)


def _best(rates: Mapping[str, Mapping[int, Result]]) -> Config:
    whole = max((runs.keys() for runs in rates.values()), key=len)
    means = {
        rate: statistics.fmean(run["score"]["last3"] for run in runs.values())
        for rate, runs in rates.items()
        if runs.keys() == whole
    }
    lower = next(iter(next(iter(rates.values())).values()))["score"]["metric"] == "loss"
    kept: Config = json.loads((min if lower else max)(means, key=lambda rate: means[rate]))
    return kept
