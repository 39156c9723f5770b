"""Signals to a run in a process of its own: it can be killed anywhere and goes on to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from simulations.simulate import simulate
from tests.conftest import ROOT
from tests.simulations.conftest import read_history, read_summary, small_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = {"rounds": 6, "local_steps": 60, "batch_size": 8}  # a round takes half a second or more
COMMAND = [sys.executable, "-m", "simulations.cli", "simulate"]


def typed(config: dict[str, Any]) -> list[str]:
    names = (
        *("model", "data", "clients", "clients-per-round", "rounds", "local-steps", "batch-size", "out"),
        *("adapter", "personal"),
    )
    return [part for name in names for part in (f"--{name}", str(config[name]))]


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C of the terminal goes to the whole group
        **options,
    )


def lines(run: Path) -> int:
    history = run / "history.jsonl"
    return history.read_bytes().count(b"\n") if history.exists() else 0


def wait_for_round(process: subprocess.Popen[str], run: Path, number: int) -> None:
    """Wait until round `number` is on disk and the next is under way."""
    deadline = time.monotonic() + 120
    while lines(run) <= number and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.poll() is None, "".join(process.communicate())
    assert lines(run) == number + 1, "the rounds are too short for this test"


def finish(arguments: list[str]) -> str:
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("adapter", "personal"), [("vblora", "none"), ("lora", "none"), ("vblora", "head,logits")]
)
def test_killed_twice_and_resumed(adapter: str, personal: str, tiny_bert: Path, topics: Path, tmp_path: Path):
    whole = small_config(tiny_bert, topics, tmp_path / "whole", adapter=adapter, personal=personal, **LONG)
    simulate(whole)

    out = tmp_path / "killed"
    arguments = typed({**whole, "out": str(out)})
    for number in (1, 3):
        process = start(arguments)
        wait_for_round(process, out, number)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        arguments = ["--resume", "--out", str(out)]
    assert not (out / "summary.json").exists()
    assert "resumed after round 3" in finish(arguments)

    assert read_history(out) == read_history(tmp_path / "whole")
    kept = [
        sorted(path.read_bytes() for path in run.glob("clients/*/personal/*/*"))
        for run in (out, tmp_path / "whole")
    ]
    assert kept[0] == kept[1]
    assert bool(kept[0]) == (personal != "none")
    first, other = read_summary(out), read_summary(tmp_path / "whole")
    assert first | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_stops_cleanly(workers: int, tiny_bert: Path, topics: Path, tmp_path: Path):
    whole = small_config(tiny_bert, topics, tmp_path / "whole", **LONG)
    at_work = [
        "--workers",
        str(workers),
    ]  # it decides who trains with whom: equal to the bit for equal numbers
    finish([*typed(whole), *at_work])

    out = tmp_path / "stopped"
    process = start([*typed({**whole, "out": str(out)}), *at_work])
    wait_for_round(process, out, 2)
    os.killpg(process.pid, signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    told = f"stopped: round 2 is saved; go on with: fedvb simulate --resume --out {out}"
    assert shown.splitlines()[-1] == told

    finish(["--resume", "--out", str(out), *at_work])
    assert read_history(out) == read_history(tmp_path / "whole")


def test_ctrl_c_while_it_loads(tiny_bert: Path, topics: Path, tmp_path: Path):
    config = small_config(tiny_bert, topics, tmp_path / "run", **LONG)
    process = start(typed(config))
    time.sleep(2)  # in the imports, or in the data
    os.killpg(process.pid, signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    # Where C code was importing, Python ends itself by the signal; a shell says 130 to both.
    assert process.returncode in (130, -signal.SIGINT)
    assert errors == ""
    assert "Traceback" not in shown
