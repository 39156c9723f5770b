"""Events and status of a run, from its directory alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fl_server.events import EventLog, Several
from fl_server.exchange import Reply, Request
from fl_server.observer import LogObserver
from fl_server.rounds import run_rounds
from fl_server.status import read_status
from tests.fl_server.fakes import make_exchange, make_settings
from vblora.errors import RunError


def refuse(request: Request, reply: Reply) -> list[Reply]:
    if request.kind == "train" and request.client == "2":
        return [replace(reply, blob=reply.blob[:-5])]
    return [] if request.kind == "train" and request.client == "4" else [reply]


def test_a_finished_run(tmp_path: Path):
    settings = make_settings(tmp_path, rounds=2, clients_per_round=5, clip_updates=1.0)
    run_rounds(make_exchange(tamper=refuse), settings, Several(LogObserver(), EventLog(tmp_path)))
    status = read_status(tmp_path)
    assert (status.phase, status.round, status.rounds, status.missing) == ("finished", 2, 2, 2)
    assert list(status.clients) == ["0", "1", "2", "3", "4"]
    assert (status.clients["0"].replies, status.clients["0"].rejected) == (4, 0)
    assert (status.clients["2"].replies, status.clients["2"].rejected) == (2, 2)
    assert "it was truncated or altered on the way" in status.clients["2"].reason
    assert status.clients["4"].replies == 2, "it evaluates"
    assert sum(client.clipped for client in status.clients.values()) >= 2
    assert status.up > 0
    assert status.score is not None


def test_a_run_that_waits_and_stops(tmp_path: Path):
    events = EventLog(tmp_path)
    (tmp_path / "history.jsonl").write_text("")
    events.waiting("2 of 3 clients are there", 60)
    status = read_status(tmp_path)
    assert (status.phase, status.why, status.round) == ("waiting", "2 of 3 clients are there", None)
    events.stopped(None)
    assert read_status(tmp_path).phase == "stopped"


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path):
    (tmp_path / "history.jsonl").write_text("")
    EventLog(tmp_path).stopped(3)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026')
    assert read_status(tmp_path).phase == "stopped"
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["saved"] == 3


def test_no_run(tmp_path: Path):
    with pytest.raises(RunError, match="no run here"):
        read_status(tmp_path)
