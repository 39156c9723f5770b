"""Where a run is, read from its directory: nothing is asked of the processes at work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fl_server.events import EVENTS_FILE
from fl_server.exchange import client_order
from fl_server.history import History
from vblora.errors import RunError

__all__ = ["ClientStatus", "RunStatus", "read_records", "read_status"]


@dataclass
class ClientStatus:
    """One client.

    Attributes:
        seen: when its last reply came; None before one.
        replies: usable ones, of training and evaluation.
        rejected: replies that were refused, or its first greeting.
        clipped: updates that were cut back.
        sent: bytes of its blobs.
        reason: of the last refusal.
    """

    seen: datetime | None = None
    replies: int = 0
    rejected: int = 0
    clipped: int = 0
    sent: int = 0
    reason: str = ""


@dataclass
class RunStatus:
    """One run.

    Attributes:
        phase: finished, stopped, waiting, or running: the last thing that was told.
        why: it waits.
        round: the last one on disk; None before any.
        rounds: to train; None where no event tells.
        score, train_loss: the last known.
        up, down: bytes of training so far.
        missing: replies of training that never came.
        heard: when the run told something last; a run that was killed tells nothing any more.
        clients: by name, in order.
    """

    phase: str = "running"
    why: str = ""
    round: int | None = None
    rounds: int | None = None
    score: float | None = None
    train_loss: float | None = None
    up: int = 0
    down: int = 0
    missing: int = 0
    heard: datetime | None = None
    clients: dict[str, ClientStatus] = field(default_factory=dict)


def read_status(run: Path) -> RunStatus:
    """Read a run's history and events, which may be half written, or not yet begun.

    Raises:
        RunError: there is no run.
    """
    events = list(_lines(run / EVENTS_FILE))
    records = read_records(run) if not events or History(run).path.is_file() else []
    status = RunStatus(
        round=records[-1]["round"] if records else None,
        score=_last(records, "score"),
        train_loss=_last(records, "train_loss"),
        up=sum(record["bytes"]["up"] for record in records),
        down=sum(record["bytes"]["down"] for record in records),
        missing=sum(len(record["missing"]) for record in records),
    )
    for event in events:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # not one of our lines
            _take(status, event)
    if (run / "summary.json").is_file():
        status.phase, status.why = "finished", ""
    status.clients = dict(sorted(status.clients.items(), key=lambda item: client_order(item[0])))
    return status


def read_records(run: Path) -> list[dict[str, Any]]:
    """The rounds in a run's history, while it may be written to.

    Raises:
        RunError: there is no run.
    """
    path = History(run).path
    if not path.is_file():
        raise RunError(f"{run}: no run here, expected a directory with {path.name}")
    return [record for record in _lines(path) if "round" in record and "bytes" in record]


def _take(status: RunStatus, event: dict[str, Any]) -> None:
    kind, name, time = event["event"], event.get("client"), datetime.fromisoformat(event["time"])
    status.heard = time
    if kind == "run_started":
        status.rounds = event["rounds"]
        for client in event["clients"]:
            status.clients.setdefault(client, ClientStatus())
        for client, reason in event["refused"].items():
            refused = status.clients.setdefault(client, ClientStatus())
            refused.rejected += 1
            refused.reason = reason
    status.phase = kind if kind in ("waiting", "stopped") else "running"
    status.why = event.get("why", "")
    if name is None:
        return
    client = status.clients.setdefault(name, ClientStatus())
    client.seen = time
    if kind == "update_clipped":
        client.clipped += 1
    elif kind == "reply_received":
        client.sent += event.get("size", 0)
        client.replies += not event["fault"]
        client.rejected += bool(event["fault"])
        client.reason = event["fault"] or client.reason


def _last(records: list[dict[str, Any]], key: str) -> float | None:
    return next((record[key] for record in reversed(records) if record[key] is not None), None)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a file that may be written to now; none where it is not there."""
    if path.is_file():
        for line in path.read_text(errors="replace").split("\n")[:-1]:
            with suppress(ValueError):  # cut off by a crash
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found
