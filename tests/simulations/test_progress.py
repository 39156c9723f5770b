"""What a run shows while it goes on."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fl_server.handshake import Fault, Roster, Task
from fl_server.history import Record, blank_record
from simulations.progress import Display
from tests.fl_server.fakes import make_blueprint, make_settings

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def task() -> Task:
    return Task(make_blueprint(), "accuracy", True, data="reviews", model="tiny")


def roster(*refused: Fault) -> Roster:
    return Roster(("0", "1", "2"), refused, "", {})


def record(number: int, **values: Any) -> Record:
    blank = blank_record(number)
    blank.update(values)  # type: ignore[typeddict-item]
    return blank


def shown(terminal: bool, tmp_path: Path) -> str:
    """Everything that a short run writes."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    settings = make_settings(tmp_path, rounds=2, clients_per_round=2)
    with Display(console) as display:
        display.run_started(settings, roster(Fault("4", "its adapter is another")), task(), [])
        display.reply_received(0, "evaluate", "0", "")
        display.round_finished(record(0, score=0.25, seconds=0.5))
        for number in (1, 2):
            display.round_started(number, ["0", "1", "2"] if number == 1 else ["0", "2"])
            if number == 1:
                display.client_dropped(number, "1", "dropped out (simulated)")
            for client, fault in (("0", ""), ("2", "index [7] out of range" if number == 2 else "")):
                for step in range(3):
                    display.on_step(step + 1, 3)
                    display._live.refresh()
                display.reply_received(number, "train", client, fault)
            display._live.refresh()
            sent = {**record(number)["bytes"], "up_per_client": 12_345, "down_per_client": 999}
            dropped = [{"client": "1", "reason": "dropped out (simulated)"}] if number == 1 else []
            rejected = [{"client": "2", "reason": "index"}] if number == 2 else []
            values = {"train_loss": 1 / number, "score": 0.5, "seconds": 123.4, "bytes": sent}
            display.round_finished(record(number, dropped=dropped, rejected=rejected, **values))
    return file.getvalue()


def test_a_pipe_gets_one_line_a_round(tmp_path: Path):
    assert shown(False, tmp_path).splitlines() == [
        "client 4 refused: its adapter is another",
        "      round  train loss  accuracy  up/client  down/client  seconds",
        "        0/2           -    0.2500          -            -      0.5",
        "        1/2      1.0000    0.5000    12.3 kB        999 B    123.4  1 dropped",
        "round 2: reply of client 2 rejected: index [7] out of range",
        "        2/2      0.5000    0.5000    12.3 kB        999 B    123.4  1 rejected",
    ]


def test_a_terminal_shows_client_step_loss_and_time_left(tmp_path: Path):
    frames = [line.strip() for line in re.split(r"[\r\n]", ANSI.sub("", shown(True, tmp_path)))]
    assert max(map(len, frames)) <= 80
    live = [line for line in frames if line.endswith("left")]
    assert any(re.match(r"round 1/2 \S+ +client 1/2  step 1/3 +\S+ left", line) for line in live)
    assert any(re.match(r"round 2/2 \S+ +client 2/2  step 3/3  loss 1.0000 +\S+ left", line) for line in live)
    assert any(re.match(r"round 2/2 \S+ +evaluating  loss 1.0000 +\S+ left", line) for line in live)
    assert any(re.fullmatch(r"[\d.,]+ clients/s  memory [\d.]+ [MG]B", line) for line in frames)


def test_speed_and_memory_for_the_closing_table(tmp_path: Path):
    with Display(Console(file=io.StringIO())) as display:
        display.run_started(make_settings(tmp_path), roster(), task(), [])
        assert list(display.measured()) == ["memory at most"], "nobody has trained"
        display.round_started(1, ["0"])
        display.reply_received(1, "train", "0", "")
        assert display.measured()["clients trained a second"] not in ("", "0")


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (None, "stopped: nothing was saved yet"),
        (3, "stopped: round 3 is saved; go on with: fedvb simulate --resume --out runs/[mine]"),
    ],
)
def test_stopped(tmp_path: Path, saved: int | None, told: str):
    file = io.StringIO()
    with Display(Console(file=file, width=40)) as display:
        display.run_started(make_settings(Path("runs/[mine]")), roster(), task(), [record(0), record(1)])
        display.stopped(saved)
    lines = file.getvalue().splitlines()
    assert lines[0] == "resumed after round 1"
    assert lines[-1] == told
