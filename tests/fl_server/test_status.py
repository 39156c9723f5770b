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
from tests.fl_server.fakes import (
    SPEC,
    FakeClient,
    FakeExchange,
    make_blueprint,
    make_exchange,
    make_settings,
)
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
    assert sum(client.sent for client in status.clients.values()) == status.up
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


def test_a_run_that_waits_for_its_first_clients(tmp_path: Path):
    """There is no history yet; the clients may never come."""
    EventLog(tmp_path).waiting("1 of 3 clients have come", 500)
    status = read_status(tmp_path)
    assert (status.phase, status.why, status.round, status.clients) == (
        "waiting",
        "1 of 3 clients have come",
        None,
        {},
    )
    assert status.heard is not None


def test_files_that_a_crash_has_left_half_written(tmp_path: Path):
    run_rounds(make_exchange(), make_settings(tmp_path, rounds=1), EventLog(tmp_path))
    (tmp_path / "summary.json").unlink()
    whole = read_status(tmp_path)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'null\n[1]\n{"event": "x"}\n{"event": 3, "time": "now"}\n\xff\xfe\n{"time": "2026')
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b'{"round": 2}\n"two"\n\x00\x00\x00')
    assert read_status(tmp_path) == whole


def test_who_was_refused_at_the_door_is_shown(tmp_path: Path):
    other = FakeClient("2", make_blueprint(replace(SPEC, seed=9)))
    exchange = FakeExchange([FakeClient("0"), FakeClient("1"), other])
    run_rounds(exchange, make_settings(tmp_path, rounds=1, clients=3), EventLog(tmp_path))
    client = read_status(tmp_path).clients["2"]
    assert (client.replies, client.rejected, client.seen) == (0, 1, None)
    assert client.reason.startswith("its adapter is")


def test_no_run(tmp_path: Path):
    with pytest.raises(RunError, match="no run here"):
        read_status(tmp_path)
