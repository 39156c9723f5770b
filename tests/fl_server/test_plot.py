"""The picture of a run, and the history that it is drawn from."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fl_server.axes import byte_axis, round_axis
from fl_server.plot import plot_score, read_history
from fl_server.rounds import run_rounds
from tests.fl_server.fakes import make_exchange, make_settings
from vblora.errors import ConfigError, RunError


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run_rounds(make_exchange(), make_settings(tmp_path / "run"))
    return tmp_path / "run"


def test_several_runs_in_one_plot(finished: Path, tmp_path: Path):
    plot_score([finished, shutil.copytree(finished, tmp_path / "other")], tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_pictures_of_each_kind_and_of_no_other(finished: Path, tmp_path: Path):
    for name, begin in (("a.svg", b"<?xml"), ("a.PDF", b"%PDF")):
        plot_score([finished], tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    for name in ("a.txt", "a"):
        with pytest.raises(ConfigError, match=r"expected one of \.png, \.svg, \.pdf"):
            plot_score([finished], tmp_path / name)
        assert not (tmp_path / name).exists()


def test_runs_are_told_apart_by_their_adapters_else_by_their_folders(finished: Path, tmp_path: Path):
    drawn = []
    for name, number in (("a", 64), ("b", 90)):
        other = shutil.copytree(finished, tmp_path / name / "run")
        (other / "config.json").write_text(json.dumps({"num-vectors": number}))
        drawn.append(other)
    last3 = json.loads((finished / "summary.json").read_text())["score"]["last3"]
    assert legend(drawn, tmp_path) == [f"vblora:64: {last3:.3f}", f"vblora:90: {last3:.3f}"]
    again = shutil.copytree(drawn[0], tmp_path / "again")
    assert legend([drawn[0], again], tmp_path) == [
        f"vblora:64, run: {last3:.3f}",
        f"vblora:64, again: {last3:.3f}",
    ]
    other = shutil.copytree(again, tmp_path / "c" / "again")
    assert legend([again, other], tmp_path) == [
        f"vblora:64, again: {last3:.3f}",
        f"vblora:64, c/again: {last3:.3f}",
    ]


def legend(runs: list[Path], folder: Path) -> list[str]:
    plot_score(runs, folder / "both.svg")
    found = re.findall(r"<!-- (.*?) -->", (folder / "both.svg").read_text())
    return [unescape(text) for text in found if text.startswith("vblora")]


@pytest.mark.parametrize(
    ("least", "most"), [(3e5, 4.5e5), (1e5, 9e5), (2e4, 1e6), (1e5, 9e7), (1e3, 1e11), (1e6, 1.01e6)]
)
def test_ticks_of_bytes_are_few_and_apart(least: float, most: float):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes, _ = figure.subplots(1, 2)
    axes.plot([least, most], [0.1, 0.9])
    axes.set_xscale("log")
    byte_axis(axes.xaxis, least, most)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    labels = [one for one in axes.get_xticklabels() if low <= one.get_position()[0] <= high]
    boxes = sorted((box.x0, box.x1) for box in (one.get_window_extent() for one in labels))
    assert len(boxes) >= 2
    assert all(before[1] < after[0] for before, after in pairwise(boxes))
    assert {one.get_text() for one in axes.get_xticklabels(minor=True)} <= {""}


def test_rounds_are_whole():
    axes = Figure().subplots()
    axes.plot([0, 1, 2], [1, 2, 3])
    round_axis(axes.xaxis)
    assert all(float(at).is_integer() for at in axes.get_xticks())


def test_a_run_that_is_not_finished_has_no_plot(finished: Path, tmp_path: Path):
    (finished / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json: not readable"):
        plot_score([finished], tmp_path / "plot.png")
    (finished / "summary.json").unlink()
    with pytest.raises(RunError, match="no finished run"):
        plot_score([finished], tmp_path / "plot.png")
    assert not list(tmp_path.glob("*plot.png"))


def test_a_damaged_history_is_an_error_of_the_run(finished: Path):
    with (finished / "history.jsonl").open("a") as file:
        file.write('{"round": 4, "sc')
    with pytest.raises(RunError, match="not readable"):
        read_history(finished)
    (finished / "history.jsonl").unlink()
    with pytest.raises(RunError, match="not readable"):
        read_history(finished)
