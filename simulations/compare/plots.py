"""Pictures of a comparison, for light and dark pages."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_server.axes import byte_axis, round_axis, round_size
from simulations.compare.results import Comparison, Row, mean_curve
from vblora.files import write_atomic

__all__ = ["DARK", "LIGHT", "Theme", "by_bytes", "by_round", "by_section", "save_png", "svg"]


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; those of lines can be told apart by colour-blind people, and by their markers."""

    text: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "#1b1f24",
    "#d8dee4",
    ("#0072b2", "#d55e00", "#009e73", "#a3478a", "#b07d00", "#3a8fc2", "#6f4ba3", "#7c4a2d"),
)
DARK = Theme(
    "#e6e9ed",
    "#3a424c",
    ("#62b6ff", "#ff8f5a", "#3ddbaa", "#f0a3d6", "#ffc857", "#9cd9ff", "#c7a6f5", "#d9a58a"),
)
MARKERS = "os^Dv<>P"
WIDTH, HEIGHT = 4.5, 4.2  # inches; about a phone's width, so that letters stay readable there
LONGEST_IN_TWO = 24  # letters of an entry of the legend, for two columns
LEGEND_LINES, LINE = 4, 0.22  # entries below each other that HEIGHT has room for; inches of each further one


def by_round(comparison: Comparison, theme: Theme = LIGHT) -> Any:
    """Mean score against rounds, a band from the least to the most of the seeds."""
    figure, axes = _figure(theme)
    for place, row in enumerate(comparison.rows):
        points = mean_curve(row)
        _line(axes, [number for number, _, _ in points], points, row, place, comparison, theme)
    round_axis(axes.xaxis)
    axes.set(xlabel="round", ylabel=comparison.metric)
    _finish(axes, figure, theme)
    return figure


def by_bytes(comparison: Comparison, theme: Theme = LIGHT) -> Any:
    """Mean score against the bytes so far: both directions, all clients, on a logarithmic axis."""
    figure, axes = _figure(theme)
    least, most = [], []
    for place, row in enumerate(comparison.rows):
        points = [point for point in mean_curve(row) if point[1] > 0]  # nothing is sent before round 1
        if points:
            least.append(points[0][1])
            most.append(points[-1][1])
        _line(axes, [sent for _, sent, _ in points], points, row, place, comparison, theme)
    axes.set_xscale("log")
    byte_axis(axes.xaxis, min(least, default=1), max(most, default=1000))
    axes.set(xlabel="sent, both directions, all clients", ylabel=comparison.metric)
    _finish(axes, figure, theme)
    return figure


def by_section(comparison: Comparison, theme: Theme = LIGHT) -> Any:
    """Bytes up, a client a round, by section of the message."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = list(dict.fromkeys(name for row in comparison.rows for name in row.sections))
    rows = list(comparison.rows)[::-1]
    sent = [{name: count for name, count in row.sections.items() if count > 0} for row in rows]
    most = max(map(len, sent), default=1)
    figure, axes = _figure(theme, max(HEIGHT, 1.5 + (0.2 + 0.1 * most) * len(rows)))
    height = 0.8 / max(1, most)
    for place, name in enumerate(names):
        # A row's own sections, one below the other around its middle.
        bars = [
            (at + height * ((len(own) - 1) / 2 - list(own).index(name)), own[name])
            for at, own in enumerate(sent)
            if name in own
        ]
        axes.barh(
            [at for at, _ in bars],
            [count for _, count in bars],
            height,
            label=name,
            color=theme.lines[place % len(theme.lines)],
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: round_size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="up, a client a round")
    axes.grid(False, axis="y")
    _finish(axes, figure, theme)
    return figure


def svg(figure: Any) -> str:
    """A figure as SVG, the same bytes each time."""
    import matplotlib as mpl

    target = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "fedvb"}):
        figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
    return target.getvalue()


def save_png(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=160, facecolor="white")
    write_atomic(path, target.getvalue())


def _figure(theme: Theme, height: float = HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), edgecolor=theme.text)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.text)
    return figure, axes


def _line(
    axes: Any,
    where: list[float] | list[int],
    points: list[tuple[int, float, list[float]]],
    row: Row,
    place: int,
    comparison: Comparison,
    theme: Theme,
) -> None:
    scores = [own for _, _, own in points]
    baseline = row.name == comparison.baseline
    colour = theme.text if baseline else theme.lines[(place - bool(comparison.baseline)) % len(theme.lines)]
    axes.plot(
        where,
        [sum(own) / len(own) for own in scores],
        "--" if baseline else "-",
        color=colour,
        marker=MARKERS[(place + place // len(MARKERS)) % len(MARKERS)],  # colours repeat: another marker then
        markersize=3.5,
        linewidth=1.6,
        label=f"{row.name}: {row.score.mean:.3f}",
    )
    if len(row.results) > 1:
        axes.fill_between(
            where, [min(own) for own in scores], [max(own) for own in scores], color=colour, alpha=0.1
        )


def _finish(axes: Any, figure: Any, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) <= LONGEST_IN_TWO else 1
    further = -(-len(labels) // columns) - LEGEND_LINES
    figure.set_figheight(figure.get_figheight() + LINE * max(0, further))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=theme.text,
    )
