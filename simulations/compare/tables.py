"""A comparison in words and tables: the verdict, cells for people, Markdown. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from simulations.compare.results import FLOAT32, SHARES, Comparison, Row
from simulations.compare.scores import Interval, Reached, Spread, paired, spread
from simulations.units import size

__all__ = [
    "byte_columns",
    "columns",
    "difference",
    "few_columns",
    "markdown",
    "score_columns",
    "section_cells",
    "shown_spread",
    "verdict",
]

Cells = list[list[str]]
Columns = Mapping[str, Callable[[Row], str]]
TARGET = 0.98  # the share of the baseline's score that the verdict goes by


def columns(comparison: Comparison) -> Columns:
    """Headings of the main table and what each shows of a row; the first is text."""
    return {**score_columns(comparison), **byte_columns(comparison)}


def score_columns(comparison: Comparison) -> Columns:
    """Those of `columns` that tell how good an adapter is, and what training it takes."""
    made: dict[str, Callable[[Row], str]] = {
        "adapter": lambda row: row.name,
        f"{comparison.metric}, {comparison.averaged}": _spread,
        "best": lambda row: f"{row.best.mean:.4f}",
    }
    if comparison.baseline:
        made[f"against {comparison.baseline}"] = lambda row: difference(row.difference, comparison.metric)
        if coded := _coded(comparison):
            made[f"against {coded.name}"] = lambda row: difference(_paired(row, coded), comparison.metric)
    more = dict.fromkeys(name for row in comparison.rows for result in row.results for name in result.more)
    made |= {name: _more(name) for name in more}
    if any(row.mean("seconds") for row in comparison.rows):
        made["seconds"] = lambda row: f"{row.mean('seconds'):,.0f}"
    if any(row.mean("memory") for row in comparison.rows):
        made["memory"] = lambda row: size(max(result.memory for result in row.results))
    if any(row.mean("gpu") for row in comparison.rows):
        made["GPU memory"] = lambda row: size(max(result.gpu for result in row.results))
    return made


def byte_columns(comparison: Comparison) -> Columns:
    """Those of `columns` that tell what an adapter sends."""
    made: dict[str, Callable[[Row], str]] = {
        "adapter": lambda row: row.name,
        "up": lambda row: size(row.mean("up")),
        "down": lambda row: size(row.mean("down")),
        "in all": lambda row: size(row.mean("total")),
    }
    if comparison.baseline:
        made[f"fewer than {comparison.baseline}"] = lambda row: _times(row.fewer)
        if coded := _coded(comparison):
            made[f"fewer than {coded.name}"] = lambda row: _times(_fewer(coded, row))
        made |= {f"to {share:.0%}": _target(share) for share in SHARES}
        if comparison.higher_is_better:
            made["to −0.5 points"] = lambda row: _reached(row.close) if row.close else ""
    return made


def few_columns(comparison: Comparison) -> Columns:
    """Those of `columns` that fit a terminal."""
    made: dict[str, Callable[[Row], str]] = {"adapter": lambda row: row.name, comparison.metric: _spread}
    if comparison.baseline:
        made["against LoRA"] = lambda row: difference(row.difference, comparison.metric)
    made["in all"] = lambda row: size(row.mean("total"))
    if comparison.baseline:
        made[f"to {TARGET:.0%}"] = _target(TARGET)
    return made


def markdown(headings: Sequence[str], cells: Cells) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(headings), rule, *cells])


def section_cells(comparison: Comparison) -> tuple[list[str], Cells]:
    """Headings and cells of the bytes that go up, a client a round: in all, then by section."""
    names = list(dict.fromkeys(name for row in comparison.rows for name in row.sections))
    headings = ["adapter", "all", *names]
    cells = [
        [
            row.name,
            size(row.mean("up")),
            *(size(row.sections[name]) if name in row.sections else "" for name in names),
        ]
        for row in comparison.rows
    ]
    return headings, cells


def difference(found: Interval | None, metric: str) -> str:
    """A paired difference: of accuracies in points, of losses as it is."""
    if found is None:
        return ""
    factor, places = (100, 1) if metric == "accuracy" else (1, 4)
    shown = _signed(factor * found.mean, places)
    if found.low is not None and found.high is not None:
        shown += f" ({_signed(factor * found.low, places)} to {_signed(factor * found.high, places)})"
    return shown


def _signed(value: float, places: int) -> str:
    """With its sign, but for what is rounded to nothing."""
    shown = f"{value:+.{places}f}"
    return shown.replace("-", "−") if float(shown) else shown[1:]


def verdict(comparison: Comparison) -> list[str]:
    """What the figures say, whoever wins; the first sentence is the answer."""
    if not comparison.baseline:
        return ["No LoRA among the runs: nothing to compare with."]
    others = [row for row in comparison.rows if row.name != comparison.baseline]
    return [
        *_cheapest(comparison),
        *(_one(row, comparison) for row in others),
        *_caveats(comparison),
    ]


def _cheapest(comparison: Comparison) -> list[str]:
    """Who comes to the target with the fewest bytes; who after, and who not. The baseline always does, where
    its evaluations were kept. Nobody where it was there before any training in most seeds."""
    goal = f"{TARGET:.0%} of {comparison.baseline}'s {comparison.metric}"
    theirs = comparison.rows[0].targets[TARGET]
    without, seeds = theirs.at_start, theirs.at_start + theirs.n
    there = [_at_start(comparison, without, seeds)] * bool(without)
    if 2 * without > seeds:
        return there
    took = {
        row.name: found
        for row in comparison.rows
        if (found := row.targets[TARGET]).n and found.median is not None
    }
    if not took:
        return []
    first, *others = sorted(took, key=lambda name: took[name].median or 0)
    told = [f"{first} came to {goal} with the fewest bytes: {_reached(took[first], ' seeds')}."]
    if others:
        told.append(f"Then {', '.join(f'{name} with {_reached(took[name])}' for name in others)}.")
    if missed := [row.name for row in comparison.rows if row.name not in took]:
        told.append(f"Most runs of {', '.join(missed)} did not come there.")
    return told + there


def _at_start(comparison: Comparison, without: int, seeds: int) -> str:
    """That the baseline learned too little in some seeds to count bytes by."""
    where = "" if seeds == 1 else f" in {without} of {seeds} seeds"
    nothing = "no bytes are counted there" if 2 * without <= seeds else "bytes to it tell nothing"
    share = f"{TARGET:.0%} of its own {comparison.metric}"
    return f"Before any training {comparison.baseline} was at {share}{where}: {nothing}."


def _one(row: Row, comparison: Comparison) -> str:
    """An adapter against the baseline: score and bytes; bytes also against the baseline through the codec."""
    found, unit = row.difference, " points" if comparison.metric == "accuracy" else ""
    told = f"{row.name}: {comparison.metric} {row.score.mean:.4f}"
    if found is not None:
        told += f", {difference(found, comparison.metric)}{unit} against {comparison.baseline}"
        if found.low is not None:
            better = (found.mean > 0) == comparison.higher_is_better
            shown = ", better" if better else ", worse"
            told += shown if found.shows_difference else ", no difference shown"
    told += f"; {_part(row.fewer)} its bytes"
    coded = _coded(comparison)
    if coded and coded is not row:
        told += f", {_part(_fewer(coded, row))} {coded.name}'s"
    return f"{told}."


def _coded(comparison: Comparison) -> Row | None:
    """The baseline through the codec, where the baseline itself is in float32."""
    return next((row for row in comparison.rows if f"{row.name}{FLOAT32}" == comparison.baseline), None)


def _paired(ours: Row, theirs: Row) -> Interval | None:
    """Ours minus theirs, by seed; None of a row and itself."""
    if ours is theirs:
        return None
    return paired(*({one.seed: one.last3 for one in row.results} for row in (ours, theirs)))


def _fewer(theirs: Row, ours: Row) -> float | None:
    """Mean bytes of theirs over ours."""
    sent = ours.mean("total")
    return theirs.mean("total") / sent if sent else None


def _times(fewer: float | None) -> str:
    return "" if fewer is None else f"{fewer:,.1f} ×"


def _part(fewer: float | None) -> str:
    """Bytes as a part of others, of which they are so many times fewer."""
    if fewer is None:
        return "an unknown part of"
    return f"1/{fewer:,.0f} of" if fewer >= 2 else f"{1 / max(fewer, 1e-9):.1f} times"


def _caveats(comparison: Comparison) -> list[str]:
    if comparison.seeds == 1:
        return ["One seed: differences of a point or two may be chance; three seeds or more tell."]
    return [f"Differences are paired by seed, {comparison.seeds} seeds; 95% intervals by Student's t."]


def shown_spread(found: Spread) -> str:
    """Mean ± standard deviation, where there is one."""
    return f"{found.mean:.4f}" + ("" if found.std is None else f" ± {found.std:.4f}")


def _spread(row: Row) -> str:
    return shown_spread(row.score)


def _more(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        found = [result.more[name] for result in row.results if name in result.more]
        return shown_spread(spread(found)) if found else ""

    return show


def _target(share: float) -> Callable[[Row], str]:
    return lambda row: _reached(row.targets[share])


def _reached(found: Reached, unit: str = "") -> str:
    """Median bytes, and how many seeds got there where not all did."""
    if found.at_start and not found.n:
        return "at the start"
    if found.median is None:
        return "not reached" if not found.count else f"{found.count} of {found.n}"
    part = found.count < found.n or found.at_start
    return size(found.median) + (f" ({found.count} of {found.n}{unit})" if part else "")
