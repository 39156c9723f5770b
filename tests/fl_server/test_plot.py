"""The picture of a run, and the history that it is drawn from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fl_server.plot import plot_score, read_history
from fl_server.rounds import run_rounds
from tests.fl_server.fakes import make_exchange, make_settings
from vblora.errors import RunError


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run_rounds(make_exchange(), make_settings(tmp_path / "run"))
    return tmp_path / "run"


def test_several_runs_in_one_plot(finished: Path, tmp_path: Path):
    plot_score([finished, shutil.copytree(finished, tmp_path / "other")], tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


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
