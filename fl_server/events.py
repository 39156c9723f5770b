"""What happens in a run, as it happens: one JSON object a line in `events.jsonl`, to read or to collect."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_server.exchange import Kind
from fl_server.handshake import Roster, Task
from fl_server.history import Record
from fl_server.observer import Observer
from fl_server.settings import ServerSettings

__all__ = ["EVENTS_FILE", "EventLog", "Several"]

EVENTS_FILE = "events.jsonl"

log = logging.getLogger("flwr.fedvb")  # below Flower's logger, whose handlers show it


class EventLog:
    """An observer that appends to a run's `events.jsonl`. The file tells of a run, but nothing reads it to go
    on: a line that cannot be written ends no run.

    Every line has `time` (UTC, ISO 8601) and `event`, the name of the observer's method.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / EVENTS_FILE
        self._failed = False

    def run_started(
        self, settings: ServerSettings, roster: Roster, task: Task, done: Sequence[Record]
    ) -> None:
        refused = {fault.client: fault.reason for fault in roster.refused}
        self._write(
            "run_started",
            rounds=settings.rounds,
            done=len(done),
            clients=list(roster.clients),
            refused=refused,
            adapter=task.blueprint.spec.kind,
            versions=dict(roster.versions),
        )

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        self._write("round_started", round=number, clients=list(clients))

    def reply_received(self, number: int, kind: Kind, client: str, fault: str, size: int = 0) -> None:
        self._write("reply_received", round=number, kind=kind, client=client, fault=fault, size=size)

    def client_dropped(self, number: int, client: str, reason: str) -> None:
        self._write("client_dropped", round=number, client=client, reason=reason)

    def update_clipped(self, number: int, client: str, cuts: str) -> None:
        self._write("update_clipped", round=number, client=client, cuts=cuts)

    def waiting(self, why: str, seconds: float) -> None:
        self._write("waiting", why=why, seconds=round(seconds, 1))

    def round_finished(self, record: Record) -> None:
        self._write("round_finished", **{key: value for key, value in record.items() if key != "digest"})

    def stopped(self, saved: int | None) -> None:
        self._write("stopped", saved=saved)

    def _write(self, event: str, **values: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **values}, allow_nan=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # a run may wait before it has begun
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode() + b"\n")
        except OSError as error:
            if not self._failed:
                log.warning("%s: cannot be written (%s)", self._path, error.strerror)
            self._failed = True


class Several:
    """Observers that are told the same, one after another."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def run_started(
        self, settings: ServerSettings, roster: Roster, task: Task, done: Sequence[Record]
    ) -> None:
        for observer in self._observers:
            observer.run_started(settings, roster, task, done)

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        for observer in self._observers:
            observer.round_started(number, clients)

    def reply_received(self, number: int, kind: Kind, client: str, fault: str, size: int = 0) -> None:
        for observer in self._observers:
            observer.reply_received(number, kind, client, fault, size)

    def client_dropped(self, number: int, client: str, reason: str) -> None:
        for observer in self._observers:
            observer.client_dropped(number, client, reason)

    def update_clipped(self, number: int, client: str, cuts: str) -> None:
        for observer in self._observers:
            observer.update_clipped(number, client, cuts)

    def waiting(self, why: str, seconds: float) -> None:
        for observer in self._observers:
            observer.waiting(why, seconds)

    def round_finished(self, record: Record) -> None:
        for observer in self._observers:
            observer.round_finished(record)

    def stopped(self, saved: int | None) -> None:
        for observer in self._observers:
            observer.stopped(saved)
