"""The gate in front of the SuperLink, called as an ASGI server would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fl_server import gate
from fl_server.gate import MOST_BYTES, Gate, GateSettings
from vblora.errors import ConfigError

NODE, RUN, TASK = "/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/runtime/acquire-task"


def make_scope(
    path: str, peer: str = "10.0.0.9", here: str = "10.0.0.1", headers: Sequence[tuple[bytes, bytes]] = ()
) -> MutableMapping[str, Any]:
    return {"type": "http", "path": path, "client": (peer, 5), "server": (here, 8000), "headers": headers}


class Server:
    """A gate before an app that remembers what reached it, with a clock of its own."""

    def __init__(self, **settings: Any) -> None:
        self.reached: list[tuple[str, int]] = []
        self.now = 1000.0
        self.gate = Gate(self._app, GateSettings(**settings), lambda: self.now)

    async def _app(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            event = await receive()
            size, more = size + len(event.get("body", b"")), event.get("more_body", False)
        self.reached.append((scope["path"], size))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def ask(
        self,
        path: str,
        peer: str = "10.0.0.9",
        body: tuple[bytes, ...] = (b"",),
        declared: int | str | None = None,
        here: str = "10.0.0.1",
        signed: datetime | None = None,
    ) -> tuple[int, str]:
        """Code and sentence of an answer; the body comes in these pieces."""
        headers = [] if declared is None else [(b"content-length", str(declared).encode())]
        if signed is not None:
            headers.append((b"flwr-timestamp", signed.isoformat().encode()))
        scope = make_scope(path, peer, here, headers)
        events = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        events[-1]["more_body"] = False
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            return events.pop(0)

        async def send(event: MutableMapping[str, Any]) -> None:
            sent.append(event)

        asyncio.run(self.gate(scope, receive, send))
        told = sent[1]["body"]
        return sent[0]["status"], json.loads(told)["detail"] if told else ""


@pytest.mark.parametrize("path", [RUN, TASK, "/docs", "/openapi.json", "/"])
def test_only_this_machine_starts_runs_and_lets_nodes_in(path: str):
    server = Server()
    code, told = server.ask(path)
    assert (code, server.reached) == (403, [])
    assert told == "refused: only the server's own machine may, and who fedvb server --operators names"
    for peer in ("127.0.0.1", "::1", "10.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"):
        assert server.ask(path, peer) == (200, "")
    assert server.ask(path, "10.0.0.1", here="10.0.0.2")[0] == 403


def test_operators_are_let_in_by_address_and_network():
    server = Server(operators=("10.0.0.9", "192.168.7.0/24"))
    assert [server.ask(RUN, peer)[0] for peer in ("10.0.0.9", "192.168.7.30", "192.168.8.30")] == [
        200,
        200,
        403,
    ]
    assert server.ask(RUN, "::ffff:192.168.7.30")[0] == 200
    with pytest.raises(ConfigError, match=r"--operators is 'my-laptop'.*; --requests is 0"):
        GateSettings(("my-laptop",), requests=0)


def test_nodes_and_the_look_at_health_come_from_anywhere():
    server = Server()
    assert server.ask(NODE, body=(b"abc", b"de"))[0] == server.ask("/health")[0] == 200
    assert server.reached == [(NODE, 5), ("/health", 0)]


def test_a_declared_length_of_10_gb_is_refused_unread():
    server = Server()
    code, told = server.ask(NODE, body=(bytes(10),), declared=10**10)
    assert (code, told) == (413, f"refused: 10000000000 bytes, expected {MOST_BYTES} at most")
    assert server.ask(NODE, declared="ten")[0] == server.ask(NODE, declared="9" * 5000)[0] == 413
    assert server.reached == []


def test_what_has_no_length_is_read_no_further_than_allowed():
    server = Server()
    assert server.ask(NODE, body=(bytes(MOST_BYTES),))[0] == 200
    assert server.ask(NODE, body=(bytes(MOST_BYTES), b"x", b"never read"))[0] == 413
    assert server.reached == [(NODE, MOST_BYTES)]


def test_nobody_asks_too_often():
    server = Server(requests=2.0)
    codes = [server.ask(NODE)[0] for _ in range(25)]
    assert codes == [200] * 20 + [503] * 5, "ten seconds' worth at once"
    assert server.ask(NODE, "10.0.0.8")[0] == 200, "others are not held up"
    server.now += 1.0
    assert [server.ask(NODE)[0] for _ in range(3)] == [200, 200, 503]


def test_nobody_sends_too_much():
    server = Server(megabytes=60.0)
    codes = [server.ask(NODE, body=(bytes(7_000_000),))[0] for _ in range(10)]
    assert codes == [200] * 9 + [503]
    server.now += 10.0
    assert server.ask(NODE)[0] == 200


def test_what_comes_in_is_charged_before_all_of_it_is_there():
    server = Server(megabytes=60.0)
    pieces = tuple(bytes(1_000_000) for _ in range(8))
    assert [server.ask(NODE, body=pieces)[0] for _ in range(8)] == [200] * 7 + [503]
    assert server.ask(NODE, "10.0.0.8", pieces)[0] == 200, "others are not held up"


class Stalled:
    """Requests that send a mebibyte each and then nothing."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.codes: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    def open(self, peer: str, count: int = 1) -> None:
        for _ in range(count):
            events = [{"type": "http.request", "body": bytes(1 << 20), "more_body": True}]

            async def receive(events: list[Any] = events) -> Any:
                return events.pop() if events else await asyncio.Event().wait()

            self.tasks.append(
                asyncio.ensure_future(self.server.gate(make_scope(NODE, peer), receive, self.send))
            )

    async def send(self, event: MutableMapping[str, Any]) -> None:
        if "status" in event:
            self.codes.append(event["status"])


def test_a_body_that_stalls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.05)
    stalled = Stalled(Server())

    async def wait() -> None:
        stalled.open("10.0.0.9")
        await asyncio.wait_for(asyncio.gather(*stalled.tasks), 10)

    asyncio.run(wait())
    assert stalled.codes == [408]
    assert stalled.server.reached == []


def test_requests_that_are_still_coming_in_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "MOST_OF_PEER", 5 << 20)
    monkeypatch.setattr(gate, "MOST_OF_ALL", 8 << 20)
    stalled = Stalled(Server())

    async def fill() -> None:
        for peer, opened, refused in (("10.0.0.9", 10, 6), ("10.0.0.8", 6, 9), ("10.0.0.7", 1, 10)):
            stalled.open(peer, opened)
            await asyncio.sleep(0.01)
            assert stalled.codes == [503] * refused
        for task in stalled.tasks:
            task.cancel()
        await asyncio.gather(*stalled.tasks, return_exceptions=True)
        stalled.open("10.0.0.7", 4)
        await asyncio.sleep(0.01)
        assert len(stalled.codes) == 10, "what is gone makes room"
        for task in stalled.tasks:
            task.cancel()

    asyncio.run(fill())


def test_a_refusal_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture):
    server = Server()
    for _ in range(3):
        server.ask(RUN)
    server.now += 61
    server.ask(RUN)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("refused '/v1/control/start-run' from 10.0.0.9: only the server's")
    server.now += 61
    server.ask("/x\nforged line")
    assert "\n" not in caplog.messages[-1]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, ""), (2, ""), (-200, ""), (60, "60 s ahead of this one"), (-900, "900 s behind this one")],
)
def test_a_clock_that_flower_refuses_is_named(seconds: int, told: str, caplog: pytest.LogCaptureFixture):
    signed = datetime.now(UTC) + timedelta(seconds=seconds)
    assert Server().ask(NODE, signed=signed)[0] == 200, "Flower decides"
    assert len(caplog.messages) == bool(told)
    assert told in "".join(caplog.messages)


def test_what_flower_calls_it():
    from flwr.common import constant
    from flwr.superlink.routers.fleet.router import router

    assert gate.CLOCK_HEADER.decode() == constant.TIMESTAMP_HEADER
    assert gate.AHEAD == constant.SYSTEM_TIME_TOLERANCE
    assert constant.TIMESTAMP_TOLERANCE <= gate.BEHIND <= constant.TIMESTAMP_TOLERANCE + gate.AHEAD
    assert router.prefix + "/" == gate.NODES
    assert constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE < MOST_BYTES


def test_a_caller_that_leaves_reaches_nobody():
    server = Server()
    scope = {"type": "http", "path": NODE, "client": None, "server": None, "headers": []}

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    async def send(event: MutableMapping[str, Any]) -> None:
        raise AssertionError(event)

    asyncio.run(server.gate(scope, receive, send))
    assert server.reached == []
