"""What is made of a finished run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from simulations.report import summary_table
from simulations.units import size
from tests.simulations.conftest import read_summary


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
    summary = read_summary(finished) | {"dropped": 77}
    Console(file=file, width=80).print(summary_table(summary, Path("runs/mine"), {"memory": "1.2 GB"}))
    table = file.getvalue()
    assert max(map(len, table.splitlines())) <= 80
    cells = {cell.strip() for line in table.splitlines() for cell in line.split("│")}
    score, head = read_summary(finished)["score"], read_summary(finished)["bytes"]["head"]
    assert {"vblora", "tiny-bert", "topics.csv", "best accuracy", f"{score['best']:.4f}"} <= cells
    assert {"runs/mine", "runs/mine/score.png", f"{head} B", "77", "1.2 GB"} <= cells


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


@pytest.mark.parametrize(("count", "told"), [(1, "last evaluation"), (2, "last two"), (3, "last three")])
def test_the_mean_of_fewer_than_three_evaluations_is_told_so(finished: Path, count: int, told: str):
    file, summary = io.StringIO(), read_summary(finished)
    summary["score"]["averaged"] = count
    Console(file=file, width=80).print(summary_table(summary, Path("runs/mine")))
    assert f"accuracy, mean of the {told} " in file.getvalue()
