"""The picture that a run leaves: score against rounds and against bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vblora.errors import RunError

__all__ = ["plot_score", "read_history"]


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
    """Draw score against rounds and against bytes, both directions, all clients. Writes a PNG.

    Raises:
        RunError: one of them is no finished run, or is damaged.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    metric = "score"
    for run in runs:
        summary = _summary(run)
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


def _summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    if not path.is_file():
        raise RunError(f"{run}: no finished run, expected {path.name} as the last round leaves it")
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable ({error})") from error
    return summary


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
