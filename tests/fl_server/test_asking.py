"""Sending the reference: who lost what it was sent a change of gets all of it, within one deadline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from fl_server import asking
from fl_server.asking import Inbox, Run, ask
from fl_server.broadcast import Broadcast
from fl_server.exchange import NEED_STATE, Reply, Request
from fl_server.settings import ServerSettings
from tests.fl_server.test_broadcast import make


@dataclass
class Clocked:
    """Answers whatever it is asked, `seconds` later; client "1" can read no change of a state."""

    reference: Broadcast
    seconds: float
    lasting: bool = True
    now: float = 1000.0
    timeouts: list[float] = field(default_factory=list)

    def ask(self, requests: Sequence[Request], timeout: float) -> Iterator[Reply]:
        self.timeouts.append(timeout)
        for request in requests:
            lost = request.client == "1" and request.blob != self.reference.blob("unknown")
            yield Reply(request.client, text=NEED_STATE if lost else "done")
        self.now += self.seconds


def told(monkeypatch: pytest.MonkeyPatch, exchange: Clocked) -> dict[str, str]:
    """What each client is taken to have answered, in a round of 100 seconds."""
    monkeypatch.setattr(asking.time, "monotonic", lambda: exchange.now)
    settings = ServerSettings(timeout_seconds=100.0)
    run = Run("run", cast(Any, exchange), settings, *cast(Any, (None, None)), ("0", "1"), cast(Any, None))
    exchange.reference.held |= {"0": 2, "1": 2}
    replies = ask(run, exchange.reference, [Request("0", "train"), Request("1", "train")], Inbox("01"))
    return {reply.client: reply.error or reply.text for reply in replies}


def test_both_times_end_with_the_round(monkeypatch: pytest.MonkeyPatch):
    exchange = Clocked(make(3), 70.0)
    assert told(monkeypatch, exchange) == {"0": "done", "1": "done"}
    assert exchange.timeouts == [100.0, pytest.approx(30.0)]


def test_who_has_no_time_left_has_failed_and_gets_all_of_it_next(monkeypatch: pytest.MonkeyPatch):
    exchange = Clocked(make(3), 98.0)
    assert told(monkeypatch, exchange) == {"0": "done", "1": asking.TOO_LATE}
    assert exchange.timeouts == [100.0]
    assert exchange.reference.blob("1") == exchange.reference.blob("unknown")


def test_where_nobody_is_late_a_long_round_is_none(monkeypatch: pytest.MonkeyPatch):
    exchange = Clocked(make(3), 500.0, lasting=False)
    assert told(monkeypatch, exchange) == {"0": "done", "1": "done"}
