"""Tables on a terminal: rich's where it is installed, plain text where it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["print_table"]

WIDEST = 200  # characters; a terminal breaks lines that are too long for it, a file does not


def print_table(
    title: str,
    rows: Sequence[Any],
    columns: Mapping[str, Callable[[Any], str]],
    notes: Sequence[str] = (),
) -> None:
    """Print rows; a column is a heading and what it shows of a row. The first is text, the others numbers."""
    cells = [[show(row) for show in columns.values()] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(title, list(columns), cells)
    else:
        table = Table(title=title, title_justify="left")
        for at, heading in enumerate(columns):
            table.add_column(heading, justify="right" if at else "left")
        for row in cells:
            table.add_row(*row)
        console = Console()
        widest = console.measure(table, options=console.options.update(width=WIDEST)).maximum
        Console(width=max(console.width, widest)).print(table)
    for note in notes:
        print(note)


def _print_plain(title: str, headings: list[str], cells: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    print(f"\n{title}")
    for row in [headings, *cells]:
        first, *others = (
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]))
