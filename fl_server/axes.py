"""Axes of pictures of runs: whole rounds, bytes with their units."""

from __future__ import annotations

from typing import Any

__all__ = ["byte_axis", "round_axis", "round_size", "size"]


def size(count: float) -> str:
    """Bytes for people: 1 kB is 1,000 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def round_size(count: float) -> str:
    """A tick: 10 MB rather than 10.0 MB."""
    return size(count).replace(".0 ", " ").replace(".00 ", " ")


def round_axis(axis: Any) -> None:
    """Ticks at whole rounds."""
    from matplotlib.ticker import MaxNLocator  # slow to import, and only needed at the end

    axis.set_major_locator(MaxNLocator(integer=True))


def byte_axis(axis: Any, least: float, most: float) -> None:
    """Ticks of a logarithmic axis of `least` to `most` bytes, so few that their letters do not touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    locator = LogLocator(subs=(1.0, 2.0, 5.0) if most < 100 * least else (1.0,), numticks=6)
    axis.set_major_locator(locator if most > 4 * least else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: round_size(value)))
    axis.set_minor_formatter(NullFormatter())
