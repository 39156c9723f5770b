"""What the results of a study say against LoRA r8: paired differences, bytes to a target, as Markdown.

Runs are compared where all but the method is the same: data, model, deal, clients, rounds, steps. A method is
an adapter with its rates, its wire and whatever else differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fl_client.hazards import HazardSettings
from fl_client.settings import DataSettings
from simulations.compare.results import FLOAT32, Comparison, Result, compared, result_of
from simulations.compare.tables import columns, markdown, verdict
from vblora.adapters import NUMBERS

__all__ = ["comparisons", "tables"]

Config = Mapping[str, Any]
# Keys of the protocol; all others are the method's.
PROTOCOL = frozenset(
    [entry.name.replace("_", "-") for kind in (DataSettings, HazardSettings) for entry in fields(kind)]
    + ["model", "clients-per-round", "rounds", "local-steps", "batch-size", "eval-every", "late-clients"]
)
BASELINE = ("lora", 8)  # kind and rank


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """A table and a verdict for every protocol of a study."""
    parts = []
    for heading, comparison in comparisons(results):
        shown = columns(comparison)
        cells = [[show(row) for show in shown.values()] for row in comparison.rows]
        told = "\n".join(f"- {line}" for line in verdict(comparison))
        parts.append("\n\n".join(part for part in (heading, markdown(list(shown), cells), told) if part))
    return "\n\n".join(parts)


def comparisons(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, Comparison]]:
    """The comparison of every protocol, with what sets it apart from the study's others."""
    protocols: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        key = {name: value for name, value in result["config"].items() if name in PROTOCOL - {"seed"}}
        protocols.setdefault(json.dumps(key, sort_keys=True), []).append(result)
    shared = set.intersection(*(set(json.loads(key).items()) for key in protocols)) if protocols else set()
    headings = [
        ", ".join(f"{name} {value}" for name, value in json.loads(key).items() if (name, value) not in shared)
        for key in protocols
    ]
    return list(zip(headings, map(_compared, protocols.values()), strict=True))


def _compared(results: Sequence[Mapping[str, Any]]) -> Comparison:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        own = {name: value for name, value in result["config"].items() if name not in PROTOCOL}
        found.setdefault(json.dumps(own, sort_keys=True), []).append(result)
    methods = [json.loads(key) for key in found]
    names = [_name(method, methods) for method in methods]
    groups = {name: [_result(one) for one in runs] for name, runs in zip(names, found.values(), strict=True)}
    metric = str(results[0]["score"]["metric"])
    return compared(groups, _baseline(dict(zip(names, methods, strict=True)), groups, metric), metric)


def _name(method: Config, methods: Sequence[Config]) -> str:
    """KIND or KIND:NUMBER, what else differs among methods of its kind, and whether nothing is rounded."""
    kind = _kind(method)
    number = NUMBERS[kind]
    text = f"{kind}:{method[number]}" if number in method else kind
    alike = [other for other in methods if _kind(other) == kind and _lossless(other) == _lossless(method)]
    told = [
        f"{name}={value}"
        for name, value in method.items()
        if name not in ("adapter", number) and any(other.get(name) != value for other in alike)
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
