"""What the results of a study say against LoRA r8: paired differences, bytes to a target, as Markdown.

Runs are compared where all but the method is the same: data, model, deal, clients, rounds, steps. A method is
an adapter with its rates, its wire and whatever else differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fl_client.hazards import HazardSettings
from fl_client.settings import DataSettings, SiteSettings
from fl_client.train import LocalSettings
from fl_server.settings import ServerSettings
from simulations.compare.results import FLOAT32, Comparison, Result, Row, compared, result_of
from simulations.compare.tables import columns, markdown, verdict
from simulations.config import default_config
from vblora.adapters import NUMBERS

__all__ = ["RATES", "comparisons", "method_of", "tables"]

Config = Mapping[str, Any]
Runs = Sequence[Mapping[str, Any]]
Methods = Mapping[str, tuple[Config, Runs]]
# Keys of the protocol; all others are the method's.
PROTOCOL = frozenset(
    [entry.name.replace("_", "-") for kind in (DataSettings, HazardSettings) for entry in fields(kind)]
    + ["model", "clients-per-round", "rounds", "local-steps", "batch-size", "eval-every", "late-clients"]
    + ["device", "dtype"]
)
# Those that every table tells in words; the others where they are given.
TOLD = frozenset(
    [
        *("model", "data", "eval-split", "clients", "clients-per-round", "rounds", "local-steps"),
        *("batch-size", "partition", "seed", "eval-every"),
    ]
)
BASELINE = ("lora", 8)  # kind and rank
RATES = ("lr-rows", "lr-bank")  # of a method's main tensor


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """A table and a verdict for every protocol of a study; below them the commands that train it again."""
    parts = []
    for found in _protocols(results).values():
        groups = _methods(found)
        comparison = _compared(groups)
        shown = {**columns(comparison), **_more_columns(groups)}
        cells = [[show(row) for show in shown.values()] for row in comparison.rows]
        told = "\n".join(f"- {line}" for line in verdict(comparison))
        parts += [_about(found, comparison.seeds), markdown(list(shown), cells), told]
    commands = dict.fromkeys(one["origin"]["command"] for one in results if "origin" in one)
    return "\n\n".join(parts + ["```sh\n" + "\n".join(commands) + "\n```"] * bool(commands))


def comparisons(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, Comparison]]:
    """The comparison of every protocol, with what sets it apart from the study's others."""
    return [(heading, _compared(_methods(found))) for heading, found in _protocols(results).items()]


def method_of(config: Config) -> dict[str, Any]:
    """Those keys of a config that are not the protocol's."""
    return {name: value for name, value in config.items() if name not in PROTOCOL}


def _protocols(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs by protocol, each told by what sets it apart."""
    protocols: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        key = {name: value for name, value in result["config"].items() if name in PROTOCOL - {"seed"}}
        protocols.setdefault(json.dumps(key, sort_keys=True), []).append(result)
    shared = set.intersection(*(set(json.loads(key).items()) for key in protocols)) if protocols else set()
    return {
        ", ".join(
            f"{name} {value}" for name, value in json.loads(key).items() if (name, value) not in shared
        ): found
        for key, found in protocols.items()
    }


def _about(results: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """The protocol and the machine, in words."""
    given = results[0]["config"]
    kinds = (SiteSettings, DataSettings, LocalSettings, ServerSettings)
    defaults = {entry.name.replace("_", "-"): entry.default for kind in kinds for entry in fields(kind)}
    config = {**defaults, "local-steps": LocalSettings.steps, **given}
    more = {name: given[name] for name in sorted(PROTOCOL - TOLD) if given.get(name)}
    told = [
        f"{Path(str(config['model'])).name} on {Path(str(config['data'])).name}"
        + (f", scored on {config['eval-split']}" if config["eval-split"] else ""),
        f"{config['clients']:,} clients, {config['clients-per-round']} a round, {config['rounds']} "
        f"rounds, {config['local-steps']} local steps of {config['batch-size']} texts, {config['partition']}",
        ", ".join(f"{name} {value}" for name, value in more.items()),
        f"{seeds} seed{'s' * (seeds > 1)}",
    ]
    machines = dict.fromkeys(
        f"{one['origin']['device']}, torch {one['versions']['client']['torch']}"
        for one in results
        if "origin" in one
    )
    return "; ".join(part for part in (*told, *machines) if part) + "."


def _methods(results: Sequence[Mapping[str, Any]]) -> Methods:
    """The methods by name, each with its runs. A default is the same, said or not."""
    defaults = default_config()
    found: dict[frozenset[tuple[str, Any]], list[Mapping[str, Any]]] = {}
    for result in results:
        said = method_of(result["config"]).items()
        key = frozenset((name, value) for name, value in said if defaults.get(name) != value)
        found.setdefault(key, []).append(result)
    methods = [method_of(runs[0]["config"]) for runs in found.values()]
    names = [_name(method, methods) for method in methods]
    return dict(zip(names, zip(methods, found.values(), strict=True), strict=True))


def _compared(methods: Methods) -> Comparison:
    groups = {name: [_result(one) for one in runs] for name, (_, runs) in methods.items()}
    metric = str(next(iter(methods.values()))[1][0]["score"]["metric"])
    baseline = _baseline({name: method for name, (method, _) in methods.items()}, groups, metric)
    return compared(groups, baseline, metric)


def _more_columns(methods: Methods) -> dict[str, Callable[[Row], str]]:
    """What only a study's runs tell, where some do: the rate of a method, the commits of its runs."""
    asked: dict[str, Callable[[Config, Runs], str]] = {
        "rate": lambda method, _: ", ".join(f"{method[key]:g}" for key in RATES if key in method),
        "commit": lambda _, runs: ", ".join(
            dict.fromkeys(run["origin"]["commit"] for run in runs if "origin" in run)
        ),
    }
    made = {
        heading: {name: show(*found) for name, found in methods.items()} for heading, show in asked.items()
    }
    return {heading: _cell(cells) for heading, cells in made.items() if any(cells.values())}


def _cell(cells: Mapping[str, str]) -> Callable[[Row], str]:
    return lambda row: cells[row.name]


def _name(method: Config, methods: Sequence[Config]) -> str:
    """KIND or KIND:NUMBER, what else differs among methods of its kind, and whether nothing is rounded.

    A rate is told among those of its number alone: each number may have found its own.
    """
    kind = _kind(method)
    number = NUMBERS[kind]
    text = f"{kind}:{method[number]}" if number in method else kind
    alike = [other for other in methods if _kind(other) == kind and _lossless(other) == _lossless(method)]
    same = [other for other in alike if other.get(number) == method.get(number)]
    told = [
        f"{name}={value}"
        for name, value in method.items()
        if name not in ("adapter", number)
        and any(other.get(name) != value for other in (same if name in RATES else alike))
    ]
    return " ".join([text, *told]) + FLOAT32 * _lossless(method)


def _kind(method: Config) -> str:
    return str(method.get("adapter", "vblora"))


def _lossless(method: Config) -> bool:
    return method.get("wire") == "lossless" and not any(name.startswith("wire-") for name in method)


def _baseline(methods: Mapping[str, Config], groups: Mapping[str, Sequence[Result]], metric: str) -> str:
    """The best LoRA r8 whose messages are not rounded, else the best of those that are; "" without one."""
    loras = [
        name
        for name, method in methods.items()
        if (method.get("adapter"), method.get("rank") or BASELINE[1]) == BASELINE
    ]
    loras = [name for name in loras if _lossless(methods[name])] or loras
    better = -1 if metric == "loss" else 1
    return max(loras, key=lambda name: better * _mean(groups[name]), default="")


def _mean(results: Sequence[Result]) -> float:
    return sum(result.last3 for result in results) / len(results)


def _result(found: Mapping[str, Any]) -> Result:
    return result_of(found, {"curve": found.get("curve", ()), "sections": found.get("sections", {})})
