"""What people look at: the plot of score against bytes, and the closing table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from vblora.errors import RunError

__all__ = ["plot_score", "read_history", "size", "summary_table"]


def read_history(run: Path) -> list[dict[str, Any]]:
    """The records of a run, one a round.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = run / "history.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable ({error})") from error


def plot_score(runs: Sequence[Path], target: Path) -> None:
    """Draw score against rounds and against bytes, both directions, all clients. Writes a PNG."""
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    metric = "score"
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        metric = summary["score"]["metric"]
        rounds, sent, scores = _curve(read_history(run))
        style = {"marker": "o", "markersize": 3, "label": f"{summary['adapter']}: {scores[-1]:.3f}"}
        by_round.plot(rounds, scores, **style)
        shown = slice(
            1 if len(runs) > 1 else 0, None
        )  # nothing is sent before round 1: no place on a log axis
        by_bytes.plot([total / 1e6 for total in sent[shown]], scores[shown], **style)
    by_round.set(xlabel="round", ylabel=metric)
    by_bytes.set(xlabel="MB sent, both directions, all clients")
    if len(runs) > 1:  # adapters differ by orders of magnitude
        by_bytes.set_xscale("log")
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_round.legend(frameon=False)
    temporary = target.with_name(f".{target.name}")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, target)


def summary_table(summary: dict[str, Any], run: Path) -> Table:
    """The closing table of one run."""
    score, sent = summary["score"], summary["bytes"]
    table = Table(box=ROUNDED, show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    rows = {
        "adapter": summary["adapter"],
        "model": _short(summary["model"]),
        "data": _short(summary["data"]),
        f"{score['metric']} at the start": f"{score['start']:.4f}",
        f"{score['metric']} at the end": f"{score['final']:.4f}",
        f"best {score['metric']}": f"{score['best']:.4f}",
        f"{score['metric']}, mean of the last three": f"{score['last3']:.4f}",
        "sent up, a client a round": size(sent["up_per_client_round"]),
        "   of it the task head": size(sent["head"]),
        "sent down, a client a round": size(sent["down_per_client_round"]),
        "sent in all, both directions": size(sent["up_total"] + sent["down_total"]),
        "numbers trained / sent": f"{summary['parameters']['trained']:,} / {summary['parameters']['sent']:,}",
        "replies rejected": str(summary["rejected"]),
        "seconds": f"{summary['seconds']:.0f}",
        "run directory": str(run),
        "plot": str(run / "score.png"),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def size(count: float) -> str:
    """Bytes for people: 1 kB is 1,000 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _short(name: str) -> str:
    """The last part of a path; hub ids, OWNER/NAME, stay whole."""
    return Path(name).name if name.count("/") > 1 else name


def _curve(records: Sequence[dict[str, Any]]) -> tuple[list[int], list[int], list[float]]:
    """Rounds, bytes so far and scores, where a score was taken."""
    rounds, sent, scores, total = [], [], [], 0
    for record in records:
        total += record["bytes"]["up"] + record["bytes"]["down"]
        if record["score"] is not None:
            rounds.append(record["round"])
            sent.append(total)
            scores.append(record["score"])
    return rounds, sent, scores
