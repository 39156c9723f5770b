"""Send a run's reference to clients and take in their replies, each once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fl_server.attendance import Attendance
from fl_server.broadcast import Broadcast
from fl_server.exchange import NEED_STATE, Exchange, Reply, Request, client_order
from fl_server.handshake import Fault, Task
from fl_server.history import RejectedReply
from fl_server.observer import Observer
from fl_server.settings import ServerSettings

__all__ = ["Inbox", "Run", "ask", "ordered", "rejected"]

WORTH_WHILE = 0.05  # of the time for replies: with less of it left nobody is asked again
TOO_LATE = "it had lost the state that it was sent a change of, and too little time was left to send it all"


@dataclass(frozen=True)
class Run:
    """What does not change during a run."""

    name: str
    exchange: Exchange
    settings: ServerSettings
    observer: Observer
    task: Task
    clients: tuple[str, ...]
    attendance: Attendance


class Inbox:
    """Lets through the first reply of every client that was asked, and counts the others.

    Attributes:
        waiting: clients that have not answered.
        ignored: replies that did not count.
        sent: bytes of the states that went down.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.waiting = set(names)
        self.ignored = 0
        self.sent = 0

    def first_of(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        for reply in replies:
            if reply.client in self.waiting:
                self.waiting.remove(reply.client)
                yield reply
            else:
                self.ignored += 1


def ask(run: Run, reference: Broadcast, requests: Sequence[Request], inbox: Inbox) -> Iterator[Reply]:
    """Send the reference to clients, each as it can best read it; who cannot gets it from version 0.

    Both times together last for `timeout_seconds`. Who would have too little of it left has failed, and is
    sent the reference from version 0 when it is next asked.
    """
    asked = {request.client: request for request in requests}
    left, end = run.settings.timeout_seconds, time.monotonic() + run.settings.timeout_seconds
    for _ in range(2):
        sent = [replace(item, blob=reference.blob(name)) for name, item in asked.items()]
        inbox.sent += sum(len(request.blob) for request in sent)
        lost: dict[str, Request] = {}
        for reply in run.exchange.ask(sent, left):
            if reply.text == NEED_STATE and reply.client in asked and reference.held.get(reply.client):
                reference.forget(reply.client)
                lost[reply.client] = asked[reply.client]
            else:
                yield reply
        if not lost:
            return
        if run.exchange.lasting:  # else nobody is ever late
            left = end - time.monotonic()
        if left < WORTH_WHILE * run.settings.timeout_seconds:
            yield from (Reply(name, error=TOO_LATE) for name in lost)
            return
        asked = lost


def ordered(faults: Iterable[Fault]) -> list[Fault]:
    """In the order of client names."""
    return sorted(faults, key=lambda fault: client_order(fault.client))


def rejected(faults: Iterable[Fault]) -> list[RejectedReply]:
    """As the history holds them."""
    return [{"client": fault.client, "reason": fault.reason} for fault in ordered(faults)]
