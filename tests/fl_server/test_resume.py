"""A run that was stopped at any point goes on as if it had not been."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fl_server.events import EventLog
from fl_server.exchange import Reply, Request
from fl_server.rounds import run_rounds
from fl_server.stepping import StepSettings
from tests.conftest import full_disk
from tests.fl_server.fakes import (
    SPEC,
    FakeClient,
    FakeExchange,
    content,
    make_blueprint,
    make_exchange,
    make_settings,
    run,
)
from vblora.errors import RunError


class Crash(BaseException):
    """As good as a kill: nothing of ours catches it."""


@dataclass
class Bomb:
    """Counts points where the process may die, and dies at one of them."""

    at: int
    passed: int = 0

    def tick(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            raise Crash


def resumable(out: Path) -> bool:
    return (out / "history.jsonl").exists()


def test_killed_at_every_point_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before and after every file operation, and at every reply."""
    run(tmp_path / "whole", rounds=3)
    expected = content(tmp_path / "whole")
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    for at in itertools.count(1):
        out, bomb = tmp_path / str(at), Bomb(at)

        def reply_or_die(request: Request, reply: Reply, bomb: Bomb = bomb) -> list[Reply]:
            bomb.tick()
            return [reply]

        for name, function in real.items():

            def file_or_die(*arguments: Any, function: Any = function, bomb: Bomb = bomb) -> None:
                bomb.tick()
                function(*arguments)
                bomb.tick()

            monkeypatch.setattr(os, name, file_or_die)
        try:
            run(out, make_exchange(tamper=reply_or_die), rounds=3)
        except Crash:
            pass
        else:
            assert bomb.passed < at
            break
        finally:
            monkeypatch.undo()
        run(out, resume=resumable(out), rounds=3)
        assert content(out) == expected, f"died at point {at}"
    assert at > 60


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_what_the_server_remembers_survives(tmp_path: Path, optimizer: str):
    step = StepSettings(optimizer, rate=0.1, decay=0.7)
    run(tmp_path / "whole", step=step)
    interrupted(tmp_path / "cut", 2, step=step)
    run(tmp_path / "cut", resume=True, step=step)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def interrupted(out: Path, rounds: int, **options: Any) -> None:
    """A run that was stopped by Ctrl-C in the round after `rounds`."""

    def stop(request: Request, reply: Reply) -> Iterator[Reply]:
        if request.config.get("round") == rounds + 1:
            raise KeyboardInterrupt
        yield reply

    with pytest.raises(KeyboardInterrupt):
        run(out, make_exchange(tamper=stop), **options)


def test_ctrl_c_leaves_the_run_resumable(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    interrupted(tmp_path / "a", 2)
    assert "stopped; round 2 is saved, go on with resume" in caplog.messages
    assert not (tmp_path / "a" / "summary.json").exists()
    run(tmp_path / "a", resume=True)
    run(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, 0.999])
def test_files_cut_short_by_a_kill(tmp_path: Path, left: float):
    run(tmp_path / "b")
    for damaged in ("history.jsonl", "checkpoints/round-00002.safetensors"):
        out = tmp_path / damaged.replace("/", "-")
        interrupted(out, 2)
        path = out / damaged
        whole = path.read_bytes()
        if damaged == "history.jsonl":  # half of the next line stands there
            path.write_bytes(whole + whole.splitlines()[-1][: int(left * 100)])
        else:
            path.write_bytes(whole[: int(left * len(whole))])
        (out / "checkpoints" / ".round-00003.safetensors.abc").write_bytes(b"half")
        run(out, resume=True)
        assert content(out) == content(tmp_path / "b")
        assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("most", [900, 1400, 2000, 2600])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(tmp_path: Path, most: int):
    """A file that cannot grow is a checkpoint, or the history, whole or in the middle of a line."""
    with full_disk(most), pytest.raises(OSError, match="File too large"):
        run(tmp_path / "a")
    assert not list((tmp_path / "a").rglob(".*")), "nothing half written is left"
    run(tmp_path / "a", resume=True)
    run(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "events.jsonl").mkdir()
    run_rounds(make_exchange(), make_settings(tmp_path, rounds=1), EventLog(tmp_path))
    assert (tmp_path / "summary.json").exists()
    (told,) = (line for line in caplog.messages if "events.jsonl" in line)
    assert told.endswith("cannot be written (Is a directory)")


@pytest.mark.slow
def test_sigkill_of_a_real_process(tmp_path: Path):
    """`kill -9` at twenty moments of a run, then resume."""
    run(tmp_path / "whole", rounds=6)
    expected = content(tmp_path / "whole")
    code = (
        "import sys, time, pathlib, tests.fl_server.fakes as t\n"
        "slow = lambda request, reply: time.sleep(0.01) or [reply]\n"
        "t.run(pathlib.Path(sys.argv[1]), t.make_exchange(tamper=slow), rounds=6)\n"
    )
    for at in range(20):
        out = tmp_path / str(at)
        process = subprocess.Popen([sys.executable, "-c", code, str(out)])
        while not resumable(out) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(0.02 * at)
        process.kill()
        process.wait()
        run(out, resume=True, rounds=6)
        assert content(out) == expected


def test_rounds_may_be_raised_and_nothing_to_do_is_fine(tmp_path: Path):
    options = {"schedule": "constant", "eval_every": 1}
    run(tmp_path / "a", rounds=2, **options)
    before = content(tmp_path / "a")
    run(tmp_path / "a", rounds=2, resume=True, **options)
    assert content(tmp_path / "a") == before
    run(tmp_path / "a", rounds=4, resume=True, **options)
    run(tmp_path / "b", rounds=4, **options)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with pytest.raises(RunError, match="the run has finished round 4, but rounds is 3"):
        run(tmp_path / "a", rounds=3, resume=True, **options)


@pytest.mark.parametrize("resume", [False, True])
def test_two_servers_never_write_into_one_directory(tmp_path: Path, resume: bool):
    """While the first waits for its clients, or trains."""
    out, refused = tmp_path / "run", []

    def second(request: Request, reply: Reply) -> list[Reply]:
        if request.client == "0" and (request.kind == "hello" or resume):
            with pytest.raises(
                RunError, match=rf"in use by another run \(process {os.getpid()}\); end"
            ) as told:
                run(out, resume=resume)
            refused.append(told)
        return [reply]

    if resume:
        interrupted(out, 1)
    run(out, FakeExchange([FakeClient(str(number)) for number in range(5)], second), resume=resume)
    assert refused
    run(tmp_path / "alone")
    assert content(out) == content(tmp_path / "alone")
    assert not (out / "lock").exists()


def test_a_killed_server_holds_no_lock(tmp_path: Path):
    (tmp_path / "lock").write_text("1")
    run(tmp_path)


def test_directories_that_are_taken_missing_or_damaged(tmp_path: Path):
    with pytest.raises(RunError, match="no run to resume"):
        run(tmp_path / "a", resume=True)
    interrupted(tmp_path / "a", 2)
    with pytest.raises(RunError, match=r"go on with resume=true \(fedvb: --resume\) or choose another out"):
        run(tmp_path / "a")

    history = tmp_path / "a" / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines[:2]))
    with pytest.raises(RunError, match="ends before round 2, but there is a checkpoint of round 2"):
        run(tmp_path / "a", resume=True)
    history.write_text("".join([lines[0], "{}\n", lines[2]]))
    with pytest.raises(RunError, match="line 2 is damaged, expected the record of round 1"):
        run(tmp_path / "a", resume=True)
    history.write_text("".join(lines))

    checkpoints = sorted((tmp_path / "a" / "checkpoints").iterdir())
    for path in checkpoints:
        path.write_bytes(b"nothing")
    with pytest.raises(RunError, match="no readable checkpoint"):
        run(tmp_path / "a", resume=True)
    for path in checkpoints:
        path.unlink()
    with pytest.raises(RunError, match="has 3 rounds, but there is no checkpoint"):
        run(tmp_path / "a", resume=True)


def test_a_run_begins_in_a_folder_of_its_own(tmp_path: Path):
    """Not over the config.json of a model."""
    (tmp_path / "config.json").write_text("a model's")
    with pytest.raises(RunError, match=r"holds config\.json; choose another out, a folder"):
        run(tmp_path, rounds=1)
    assert (tmp_path / "config.json").read_text() == "a model's"


def test_resume_with_another_adapter_tells_what_differs(tmp_path: Path):
    interrupted(tmp_path, 2)
    other = make_blueprint(replace(SPEC, rank=4, seed=6))
    exchange = FakeExchange([FakeClient(str(number), other) for number in range(5)])
    with pytest.raises(RunError) as error:
        run(tmp_path, exchange, resume=True)
    assert str(error.value).endswith(
        "rank: the checkpoint has 2, the clients 4; seed: the checkpoint has 5, the clients 6"
    )
