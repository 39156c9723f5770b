"""The picture that a run leaves: score against rounds and against bytes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_server.axes import byte_axis, round_axis
from fl_server.config_file import CONFIG_FILE, read_config
from vblora.adapters import NUMBERS
from vblora.errors import ConfigError, RunError
from vblora.files import write_atomic

__all__ = ["plot_score", "read_history"]

ENDINGS = (".png", ".svg", ".pdf")


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
    """Draw score against rounds and against bytes, both directions, all clients.

    Args:
        runs: finished ones.
        target: a file that ends in one of `ENDINGS`.

    Raises:
        ConfigError: another ending.
        RunError: one of them is no finished run, or is damaged.
    """
    ending = target.suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(f"{target}: ends in {ending!r}, expected one of {', '.join(ENDINGS)}")
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    figure = Figure(figsize=(9, 3.6 + 0.2 * len(runs)), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    summaries = [_summary(run) for run in runs]
    reach = []
    for run, name, summary in zip(runs, _names(runs, summaries), summaries, strict=True):
        rounds, sent, scores = _curve(read_history(run))
        mean = "" if summary["score"]["last3"] is None else f": {summary['score']['last3']:.3f}"
        style = {"marker": "o", "markersize": 3, "label": f"{name}{mean}"}
        by_round.plot(rounds, scores, **style)
        shown = [(total, score) for total, score in zip(sent, scores, strict=True) if total]
        by_bytes.plot([total for total, _ in shown], [score for _, score in shown], **style)
        reach += [total for total, _ in shown]
    by_round.set(xlabel="round", ylabel=summaries[0]["score"]["metric"])
    round_axis(by_round.xaxis)
    by_bytes.set(xlabel="sent, both directions, all clients")
    by_bytes.set_xscale("log")  # adapters differ by orders of magnitude; nothing is sent before round 1
    byte_axis(by_bytes.xaxis, min(reach, default=1), max(reach, default=1000))
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*by_round.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=120, format=ending[1:])
    write_atomic(target, drawing.getvalue())


def _names(runs: Sequence[Path], summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """KIND or KIND:NUMBER of each run, and where two are alike its folder, or as much of its path as tells
    them apart."""
    kinds = [_kind(run, summary["adapter"]) for run, summary in zip(runs, summaries, strict=True)]
    shared = os.path.commonpath([run.absolute() for run in runs])
    below = [run.absolute().relative_to(shared) for run in runs]
    paths = [f"{kind}, {path}" for kind, path in zip(kinds, below, strict=True)]
    folders = [f"{kind}, {run.name}" for kind, run in zip(kinds, runs, strict=True)]
    return next((names for names in (kinds, folders) if len({*names}) == len(runs)), paths)


def _kind(run: Path, kind: str) -> str:
    """The adapter of a run as `--adapters` names it, with its number where one was asked for."""
    config = read_config(run) if (run / CONFIG_FILE).is_file() else {}
    number = config.get(NUMBERS[kind], 0)
    return f"{kind}:{number}" if number else kind


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
