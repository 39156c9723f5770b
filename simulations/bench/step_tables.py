"""What a step was measured to cost, on a terminal and in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from simulations.bench.tables import print_table

__all__ = ["markdown", "show"]

COLUMNS: Mapping[str, Callable[[Any], str]] = {
    "": lambda row: row["name"],
    "ms a step": lambda row: f"{row['step_ms']:.1f}",
    "× base": lambda row: _or_dash(row["to_base"], ".3f"),
    "× ours": lambda row: _or_dash(row["to_ours"], ".2f"),
    "peak GiB": lambda row: _or_dash(row["peak_gib"] or None, ".2f"),
    "above base": lambda row: _or_dash(row["above"], ".1%"),
}


def show(table: Mapping[str, Any]) -> None:
    """Print one table of `simulations.bench.step.measure` and what there is to know beside it."""
    print_table(_title(table), table["rows"], COLUMNS, list(_notes(table)))
    sys.stdout.flush()


def markdown(found: Mapping[str, Any]) -> str:
    """All tables of a run, from its JSON."""
    machine = found["machine"]
    named = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {machine['versions'].get(name, 'is missing')}" for name in named)
    lines = [f"{machine['device']}, {versions}.", ""]
    for table in found["tables"]:
        lines += [f"| {' | '.join([_title(table), *list(COLUMNS)[1:]])} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |" for row in table["rows"]]
        lines += ["", *(f"- {note}" for note in _notes(table)), ""]
    return "\n".join(lines)


def _title(table: Mapping[str, Any]) -> str:
    return f"{table['shape']}, {table['tokens']} tokens a step"


def _notes(table: Mapping[str, Any]) -> Iterator[str]:
    yield from table["notes"]
    for name, found in table.get("kernels", {}).items():
        yield f"{name}: {found['count']} kernels, busy {found['busy_ms']:.1f} ms"
    for name, places in table.get("waits", {}).items():
        yield f"{name}: waits for the GPU at {places or 'no place'}"
    for name, error in table.get("errors", {}).items():
        yield f"{name}: the bank's gradient differs from ours by {error:.1e} of its norm"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
