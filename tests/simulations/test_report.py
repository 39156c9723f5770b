"""What is made of a finished run."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from simulations.report import plot_score, read_history, size, summary_table
from tests.simulations.conftest import read_summary
from vblora.errors import RunError


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (123_456, "123.5 kB"),
        (2_500_000, "2.5 MB"),
        (7_654_321_000, "7.65 GB"),
        (12.5e12, "12500.00 GB"),
    ],
)
def test_bytes_for_people(count: float, shown: str):
    assert size(count) == shown


def test_the_closing_table(finished: Path):
    file = io.StringIO()
    Console(file=file, width=80).print(summary_table(read_summary(finished), Path("runs/mine")))
    table = file.getvalue()
    assert max(map(len, table.splitlines())) <= 80
    cells = {cell.strip() for line in table.splitlines() for cell in line.split("│")}
    score, head = read_summary(finished)["score"], read_summary(finished)["bytes"]["head"]
    assert {"vblora", "tiny-bert", "topics.csv", "best accuracy", f"{score['best']:.4f}"} <= cells
    assert {"runs/mine", "runs/mine/score.png", f"{head} B"} <= cells


def test_long_names_do_not_break_the_table(finished: Path):
    file = io.StringIO()
    summary = read_summary(finished) | {
        "model": "some-owner/a-model",
        "data": "[red]/" + "very-" * 30 + "long.csv",
    }
    Console(file=file, width=80).print(summary_table(summary, Path("/a" * 90)))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert "some-owner/a-model" in file.getvalue()
    assert "[red]/very-" in file.getvalue()


def test_several_runs_in_one_plot(finished: Path, tmp_path: Path):
    plot_score([finished, shutil.copytree(finished, tmp_path / "other")], tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_damaged_history_is_an_error_of_the_run(run_copy: Path):
    with (run_copy / "history.jsonl").open("a") as file:
        file.write('{"round": 4, "sc')
    with pytest.raises(RunError, match="not readable"):
        read_history(run_copy)
    (run_copy / "history.jsonl").unlink()
    with pytest.raises(RunError, match="not readable"):
        read_history(run_copy)
