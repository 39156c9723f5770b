"""Who watches a run: progress bars, logs, metrics. An observer changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from fl_server.exchange import Kind
from fl_server.handshake import Roster, Task
from fl_server.history import Record
from fl_server.settings import ServerSettings

__all__ = ["LogObserver", "Observer"]


class Observer(Protocol):
    """What the round loop tells, in this order; all but the first and the last come again and again.

    `waiting` may come before anything else: for the clients of a run to come.
    """

    def run_started(
        self, settings: ServerSettings, roster: Roster, task: Task, done: Sequence[Record]
    ) -> None:
        """The clients are known. `done` holds the records of earlier rounds where a run is resumed."""

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        """`clients` are asked to train. Round 0 trains nobody: it is the first evaluation."""

    def reply_received(self, number: int, kind: Kind, client: str, fault: str, size: int = 0) -> None:
        """A reply came, with a blob of `size` bytes; where it was rejected, `fault` says why."""

    def client_dropped(self, number: int, client: str, reason: str) -> None:
        """A client takes no part in the round, as it says itself."""

    def update_clipped(self, number: int, client: str, cuts: str) -> None:
        """An update reached further than the others, and was cut back."""

    def waiting(self, why: str, seconds: float) -> None:
        """The run waits for clients, for so many seconds more at most."""

    def round_finished(self, record: Record) -> None:
        """The round is on disk."""

    def stopped(self, saved: int | None) -> None:
        """The run ended before its last round, by an error or Ctrl-C; round `saved` is the last on disk."""


class LogObserver:
    """One log line for every round and every rejected reply."""

    def __init__(self, log: logging.Logger | None = None) -> None:
        self._log = log or logging.getLogger(__name__)
        self._rounds = 0

    def run_started(
        self, settings: ServerSettings, roster: Roster, task: Task, done: Sequence[Record]
    ) -> None:
        self._rounds = settings.rounds
        for fault in roster.refused:
            self._log.warning("client %s refused: %s", fault.client, fault.reason)
        self._log.info(
            "%s run %s: %d clients, rounds %d to %d, adapter %s with %d rows",
            "resumed" if done else "started",
            settings.out,
            len(roster.clients),
            len(done),
            settings.rounds,
            task.blueprint.spec.kind,
            task.blueprint.rows,
        )

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        self._log.debug("round %d: asking %d clients", number, len(clients))

    def reply_received(self, number: int, kind: Kind, client: str, fault: str, size: int = 0) -> None:
        if fault:
            self._log.warning("round %d: client %s: %s reply rejected: %s", number, client, kind, fault)

    def client_dropped(self, number: int, client: str, reason: str) -> None:
        self._log.debug("round %d: client %s: %s", number, client, reason)

    def update_clipped(self, number: int, client: str, cuts: str) -> None:
        self._log.warning("round %d: client %s: update cut back: %s", number, client, cuts)

    def waiting(self, why: str, seconds: float) -> None:
        self._log.warning("waiting, %.0f s more at most: %s", seconds, why)

    def round_finished(self, record: Record) -> None:
        self._log.info(
            "round %d/%d: train loss %s, score %s, up %d B and down %d B a client, %d of %d clients, %.1f s",
            record["round"],
            self._rounds,
            _shown(record["train_loss"]),
            _shown(record["score"]),
            record["bytes"]["up_per_client"],
            record["bytes"]["down_per_client"],
            record["replies"],
            record["clients"],
            record["seconds"],
        )

    def stopped(self, saved: int | None) -> None:
        if saved is None:
            self._log.warning("stopped before anything was saved")
        else:
            self._log.warning("stopped; round %d is saved, go on with resume", saved)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
