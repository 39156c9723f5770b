"""The bench of a message's arrival, as it is told from the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.simulations.conftest import Run


@pytest.mark.slow
def test_with_a_trainer_and_without(
    fedvb: Run, tiny_bert: Path, topics: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # it starts processes in another folder
    told = fedvb("bench", "arrival", "--data", topics, "--model", tiny_bert, "--repeats", "1")
    assert told.code == 0, told.err
    rows = [line.split() for line in told.out.splitlines() if "arrival" in line and "│" in line]
    (with_trainer,), (alone,) = (
        [float(row[5]) for row in rows if row[1] == way] for way in ("trainer", "alone")
    )
    assert with_trainer < alone / 5
