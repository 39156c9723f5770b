"""The report of a comparison: one HTML file that needs no other, for phones and laptops, light and dark."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fl_client.partition import AUTO_ALPHA
from simulations.compare.plots import DARK, LIGHT, Theme, by_bytes, by_round, by_section, svg
from simulations.compare.protocol import GRID, TUNING_SEEDS, Protocol
from simulations.compare.results import FLOAT32, Comparison
from simulations.compare.study import Outcome, Trial
from simulations.compare.tables import Cells, Columns, byte_columns, score_columns, section_cells
from simulations.units import size

__all__ = ["page"]

SHOWN = (  # of the config
    *("model", "data", "task", "eval-split", "max-examples", "max-length", "partition", "clients"),
    *("clients-per-round", "rounds", "local-steps", "batch-size", "schedule", "eval-every", "eval-examples"),
    *("target-modules", "lr-head", "lr-logits", "dropout", "stragglers", "wire"),
)


def page(outcome: Outcome, command: str) -> str:
    """The whole report.

    Args:
        outcome: what was found.
        command: that gives it again.
    """
    protocol, comparison = outcome.protocol, outcome.comparison
    model, data = (_short(str(protocol.base[key])) for key in ("model", "data"))
    headings, cells = section_cells(comparison)
    return Template(_template()).substitute(
        title=html.escape(f"{model} on {data}: what adapters cost to communicate"),
        about=html.escape(_about(protocol, comparison)),
        verdict="\n".join(f"<p>{html.escape(line)}</p>" for line in outcome.verdict),
        pictures="\n".join(_pictures(comparison)),
        parts=_parts(comparison),
        scores=_rows_table(comparison, score_columns(comparison), "Scores"),
        bytes=_rows_table(comparison, byte_columns(comparison), "Bytes"),
        averaged=comparison.averaged,
        unit=" in points" if comparison.metric == "accuracy" else "",
        baseline=html.escape(comparison.baseline),
        codec=html.escape(_codec(comparison)),
        sections=_table(headings, cells, "Bytes by part of the message"),
        runs=_table(*_run_cells(comparison), "Each run"),
        rates_text=html.escape(_rates_text(protocol)),
        rates=_table(*_rate_cells(protocol, outcome.trials), "Rates") if protocol.tune else "",
        protocol="\n".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(protocol.base[key]))}</dd>"
            for key in SHOWN
            if protocol.base.get(key) not in (None, "", 0, "auto")
        ),
        command=html.escape(command),
        machine=html.escape(_machine(outcome.machine)),
    )


def _template() -> str:
    return resources.files("simulations.compare").joinpath("page.html").read_text(encoding="utf-8")


def _about(protocol: Protocol, comparison: Comparison) -> str:
    base = protocol.base
    by = base["partition"]
    if by == "auto":
        mixed = f"dirichlet:{AUTO_ALPHA:g}"
        by = mixed if comparison.metric == "accuracy" else f"iid, or {mixed} where texts have groups"
    seeds = "one seed" if protocol.seeds == 1 else f"{protocol.seeds} seeds"
    return (
        f"{base['clients']} clients, {base['clients-per-round']} a round, {base['rounds']} rounds of "
        f"{base['local-steps']} steps of {base['batch-size']} texts, dealt by {by}; {seeds}. "
        f"The score is {comparison.metric} on held-out texts"
        f"{'' if comparison.higher_is_better else ', lower is better'}."
    )


def _pictures(comparison: Comparison) -> list[str]:
    scores = "; ".join(f"{row.name} {row.score.mean:.3f}" for row in comparison.rows)
    totals = "; ".join(f"{row.name} {size(row.mean('total'))}" for row in comparison.rows)
    metric = comparison.metric
    band = "Means over seeds; bands from the least to the most." if comparison.seeds > 1 else "One seed."
    return [
        _picture(
            comparison,
            by_round,
            f"{metric} against rounds. Mean of the {comparison.averaged}: {scores}.",
            band,
        ),
        _picture(
            comparison,
            by_bytes,
            f"{metric} against bytes sent in both directions by all clients, logarithmic. In all: {totals}.",
            "The further left a line rises, the less it costs to communicate.",
        ),
    ]


def _parts(comparison: Comparison) -> str:
    parts = "; ".join(f"{row.name} {size(row.mean('up'))}" for row in comparison.rows)
    alt = f"Bytes up a client a round by part of the message, logarithmic. In all: {parts}."
    return _picture(comparison, by_section, alt, "A client a round, on average; the axis is logarithmic.")


def _picture(comparison: Comparison, draw: Callable[[Comparison, Theme], Any], alt: str, caption: str) -> str:
    light, dark = (_data_uri(svg(draw(comparison, theme))) for theme in (LIGHT, DARK))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _data_uri(drawing: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode()


def _table(headings: Sequence[str], cells: Cells, label: str) -> str:
    """A table that scrolls sideways where it is too wide; a keyboard can scroll it too."""
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in cells
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _rows_table(comparison: Comparison, shown: Columns, label: str) -> str:
    return _table(list(shown), [[show(row) for show in shown.values()] for row in comparison.rows], label)


def _run_cells(comparison: Comparison) -> tuple[list[str], Cells]:
    headings = ["adapter", "seed", "start", comparison.averaged, "best", "final", "in all", "seconds"]
    cells = [
        [
            row.name,
            str(one.seed),
            *(f"{value:.4f}" for value in (one.start, one.last3, one.best, one.final)),
            size(one.total),
            f"{one.seconds:,.0f}",
        ]
        for row in comparison.rows
        for one in row.results
    ]
    return headings, cells


def _rates_text(protocol: Protocol) -> str:
    if not protocol.tune:
        return (
            "Skipped: rates were not tuned. Each adapter trained at its default rate, or at the one that was "
            "given. --tune 1 tries three of each on a part of the training texts."
        )
    grid = ", ".join(f"{factor:g}" for factor in GRID)
    seeds = f"seed {TUNING_SEEDS}" if protocol.tune == 1 else f"{protocol.tune} seeds from {TUNING_SEEDS} on"
    return (
        f"Chosen for each adapter alike: {grid} times its default rate, each trained to the end on nine "
        f"tenths of the training texts and scored on the rest ({seeds}). What the tables above are scored on "
        "took no part. The task head's rate is the same for all."
    )


def _rate_cells(protocol: Protocol, trials: Mapping[str, Sequence[Trial]]) -> tuple[list[str], Cells]:
    """Of each contender the rates that were tried, with their scores on validation, and the one kept."""
    cells = []
    for name, tried in trials.items():
        place = [trial.chosen for trial in tried].index(True)
        edge = ", at the edge" if place in (0, len(tried) - 1) else ""
        cells.append(
            [
                name,
                protocol.contenders[name].rate,
                *(
                    f"{trial.rate:g}: {statistics.fmean(trial.scores):.4f}" if trial.scores else "broke off"
                    for trial in tried
                ),
                f"{tried[place].rate:g}{edge}",
            ]
        )
    return ["adapter", "rate", *(f"{factor:g} ×" for factor in GRID), "kept"], cells


def _codec(comparison: Comparison) -> str:
    if not comparison.baseline.endswith(FLOAT32):
        return "All adapters' messages pass through one codec."
    return (
        f"{comparison.baseline} sends float32 numbers both ways; all other messages, LoRA's too, pass "
        "through one codec."
    )


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    how = f"runs at a time: {machine['at_once']}, processes of each: {max(1, machine['workers'])}, "
    how += f"threads of each: {machine['threads']}"
    return f"{machine['device']}; {how}. {versions}."


def _short(name: str) -> str:
    """The last part of a path; hub ids, OWNER/NAME, stay whole."""
    return Path(name).name if name.count("/") > 1 else name
