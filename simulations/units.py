"""Quantities as people read them."""

from __future__ import annotations

from fl_server.axes import size

__all__ = ["duration", "last_evaluations", "size"]


def duration(seconds: float) -> str:
    """Time for people: seconds below two minutes, minutes below two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def last_evaluations(count: int) -> str:
    """The evaluations that a score is the mean of: three at the end, or as many as there are."""
    return {1: "last evaluation", 2: "last two"}.get(count, "last three")
