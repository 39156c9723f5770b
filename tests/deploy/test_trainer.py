"""A trainer as its operator handles it: a real process, stopped at every stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fl_client.questions import Answer, Question
from fl_client.thin import ask_trainer, trainer_listens, trainer_status
from tests.conftest import ROOT
from tests.deploy.conftest import write_texts
from vblora.errors import RunError
from vblora.spec import Blueprint
from vblora.state import initial_state
from vblora.wire import encode_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

LABELS = ["food", "space", "sport"]


class Trainer:
    """One `fedvb trainer`; what it says is in `log`."""

    def __init__(self, folder: Path, model: Path, data: Path, *options: str) -> None:
        self.folder, self.socket = folder, folder / "s" / "trainer.sock"
        command = [sys.executable, "-m", "simulations.cli", "trainer", "--model", model, "--data", data]
        command += ["--labels", ",".join(LABELS), "--state", folder / "s", *options]
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True
        )

    def busy(self) -> str | None:
        """What it is at; None before it answers."""
        try:
            return trainer_status(self.socket).busy
        except RunError:
            return None

    def wait(self, until: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    def ready(self) -> Trainer:
        self.wait(lambda: self.busy() == "")
        return self

    def stop(self, number: int) -> tuple[int, list[str]]:
        """Send a signal; its exit code and the lines it said."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[1].splitlines()
        return self.process.returncode, said


@pytest.fixture
def start(folder: Path, minilm: Path) -> Iterator[Callable[..., Trainer]]:
    data = write_texts(folder / "notes.csv", LABELS, 40, 1)
    # Where the tests run in the background, SIGINT is ignored, and would be by what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    made: list[Trainer] = []

    def start(*options: str) -> Trainer:
        made.append(Trainer(folder, minilm, data, *options))
        return made[-1]

    yield start
    signal.signal(signal.SIGINT, before)
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_stopped_while_it_loads(start: Callable[..., Trainer]):
    first = start()
    first.wait(lambda: first.busy() == "loading")
    code, said = first.stop(signal.SIGINT)
    assert (code, said) == (130, [])
    assert not trainer_listens(first.socket)
    assert start().ready().stop(signal.SIGTERM)[0] == 0, "nothing is left that would keep the next one out"


def test_stopped_while_it_trains_and_one_at_a_time(start: Callable[..., Trainer]):
    first = start("--log-json").ready()
    second = start()
    code, said = second.process.wait(120), second.process.communicate()[1].splitlines()[-1]
    assert code == 2
    assert said.startswith(
        f"fedvb: --state {first.folder}/s: in use by another trainer (process {first.process.pid})"
    )

    described = json.loads(ask_trainer(first.socket, Question(0, "describe"), {}).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    blob = encode_state(initial_state(blueprint), blueprint)
    found: list[Answer] = []
    question = Question(0, "train", blob, {"round": 1, "lr-scale": 1.0})
    asking = threading.Thread(
        target=lambda: found.append(ask_trainer(first.socket, question, {"local-steps": 5000}))
    )
    asking.start()
    first.wait(lambda: first.busy() == "train")
    code, said = first.stop(signal.SIGINT)
    asking.join(60)
    assert code == 0
    assert "stopped" in [json.loads(line)["message"] for line in said if line.startswith("{")]
    assert found[0].error in (
        "trainer: the trainer was stopped, or its caller has gone",
        "trainer: it does not run, or died at work",
    )
    assert not first.socket.exists()
