"""The exchange over a grid: names, nodes that come late or back, replies that do no harm."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fl_server.app import GridExchange, app
from fl_server.exchange import Reply, Request
from fl_server.observer import LogObserver
from simulations.grid import InProcessGrid, one_by_one, run_server_app
from tests.simulations.test_grid import answer, fake_client_app, run_config, to_message
from vblora.errors import DataError

# --- The exchange over a grid ---------------------------------------------------------------------


def test_clients_are_named_and_ordered_by_their_hello():
    grid = InProcessGrid(one_by_one(fake_client_app()), 12)
    exchange = GridExchange.meet(grid, 11, 1.0)
    assert exchange.clients() == [str(number) for number in range(11)]
    replies = list(exchange.ask([Request(name, "hello") for name in exchange.clients()], 1.0))
    assert [reply.client for reply in replies] == exchange.clients()
    assert json.loads(replies[3].text)["examples"] == 103


def test_nodes_without_a_name_and_nodes_of_one_name():
    def mute(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message, context in zip(messages, contexts, strict=True):
            if context.node_config["partition-id"] == 1:
                raise DataError("client 1: no such file")
            yield answer(message, context)

    exchange = GridExchange.meet(InProcessGrid(mute, 3), 3, 1.0)
    assert exchange.clients() == ["0", "2", "node-3"]
    (reply,) = exchange.ask([Request("node-3", "hello")], 1.0)
    assert reply == Reply("node-3", error="client 1: no such file")

    def twins(messages: list[Message], contexts: list[Context]) -> list[Message]:
        return [to_message(Reply("7", text="{}"), message) for message in messages]

    exchange = GridExchange.meet(InProcessGrid(twins, 3), 3, 1.0)
    replies = list(exchange.ask([Request(name, "hello") for name in exchange.clients()], 1.0))
    assert [reply.client for reply in replies] == ["node-2", "node-3", "node-4"]
    told = r"nodes 2 and 3 and 4 have one name, 7; give each its own \(fedvb site --name; .*"
    assert all(re.fullmatch(told, reply.error) for reply in replies)


def test_a_site_whose_trainer_starts_late_takes_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fl_server.app.GREET_AGAIN", 0.05)
    asked: list[int] = []

    class Deployed(InProcessGrid):
        in_process = False

    def told(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message in messages:
            asked.append(node := message.metadata.dst_node_id)
            if node == 3 and asked.count(3) < ready:
                yield Message(Error(2, "trainer: none runs at this site"), reply_to=message)
            else:
                yield to_message(Reply(f"site {node}", text="{}"), message)

    class Observer(LogObserver):
        def waiting(self, why: str, seconds: float) -> None:
            waits.append(why)

    ready, waits = 3, []
    exchange = GridExchange.meet(Deployed(told, 2), 2, 30.0, Observer())
    assert waits == ["1 of 2 clients are ready; no trainer at node-3"]
    assert (exchange.clients(), asked) == (["site 2", "site 3"], [2, 3, 3, 3])
    ready = 1_000_000
    exchange = GridExchange.meet(Deployed(told, 2), 2, 0.3)
    assert exchange.clients() == ["node-3", "site 2"], "refused, when the time is over"
    assert len(asked) > 6
    asked.clear()
    assert GridExchange.meet(Deployed(told, 3), 2, 30.0).clients() == ["site 2", "site 4"]
    assert asked == [2, 3, 4], "enough are there"


@pytest.mark.parametrize("claimed", ["0", "node-2"])
def test_a_run_goes_on_without_nodes_of_one_name(tmp_path: Path, claimed: str):
    """A name that is another node's, or that such a one would be called by."""

    def twins(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message, context in zip(messages, contexts, strict=True):
            reply = answer(message, context)
            if context.node_config["partition-id"] == 4:
                reply.content["text"]["client"] = claimed
            yield reply

    config = run_config(tmp_path, rounds=1)
    run_server_app(app, InProcessGrid(twins, 5), config)
    assert json.loads((tmp_path / "summary.json").read_text())["clients"] == (3 if claimed == "0" else 4)


def test_a_node_that_comes_back_before_its_trainer_is_ready_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    """Nodes 2 and 3 are clients 0 and 1; client 1 comes back as node 4, and a stranger as node 5."""
    asked: list[int] = []
    names, online = {2: "0", 3: "1", 5: "stranger"}, [2, 3]

    class Changing(InProcessGrid):
        def get_node_ids(self) -> Iterable[int]:
            return online

    def told(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message in messages:
            asked.append(node := message.metadata.dst_node_id)
            if node in names:
                yield to_message(Reply(names[node], text="{}"), message)
            else:
                yield Message(Error(2, "trainer: none runs at this site"), reply_to=message)

    exchange = GridExchange.meet(Changing(told, 4), 2, 1.0)
    online[:] = [2, 4, 5]
    assert exchange.present() == exchange.present() == ["0"]
    assert asked == [2, 3, 4, 5], "not at once"
    later = time.monotonic() + 31
    monkeypatch.setattr("fl_server.app.time.monotonic", lambda: later)
    names[4] = "1"
    assert exchange.present() == ["0", "1"]
    assert asked == [2, 3, 4, 5, 4]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict({"text": ConfigRecord({"blob": "text"})}), "the blob is str, expected bytes"),
        (RecordDict({"blob": MetricRecord({})}), "the blob is neither an ArrayRecord nor a ConfigRecord"),
        (RecordDict({"blob": ArrayRecord({})}), "KeyError"),
        (RecordDict({"blob": ArrayRecord({"blob": Array("uint8", (1,), "other", b"x")})}), "stype other"),
        (RecordDict({"text": ArrayRecord({})}), ""),
    ],
)
def test_malformed_replies_do_no_harm(content: RecordDict, reason: str):
    def handle(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message, context in zip(messages, contexts, strict=True):
            hello = message.metadata.message_type == "query.hello"
            yield answer(message, context) if hello else Message(content, reply_to=message)

    exchange = GridExchange.meet(InProcessGrid(handle, 1), 1, 1.0)
    (reply,) = exchange.ask([Request("0", "train", b"x")], 1.0)
    assert reason in reply.error
    assert reply.blob == b""


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("client 1 has no rows", "client 1 has no rows"),
        ("<class 'vblora.errors.DataError'>:<'client 1 has no rows'>", "DataError: client 1 has no rows"),
        (
            "<class 'ray.RayTaskError(ClientAppException)'>:<'\x1b[36mray::run()\x1b[39m (pid=3)\n"
            "Exception ClientAppException occurred. Message: client 1\nhas no rows'>",
            "client 1 has no rows",
        ),
        (None, "Flower error 8"),
        ("x" * 9999, "x" * 500),
        ("\x1b]0;owned\x07\x1b[2J\x1b[1Aclient 3\u202e is fine", "]0;owned [2J [1Aclient 3 is fine"),
    ],
)
def test_reasons_are_one_plain_line(told: str | None, shown: str):
    def handle(messages: list[Message], contexts: list[Context]) -> list[Message]:
        return [Message(Error(8, told), reply_to=message) for message in messages]

    exchange = GridExchange(InProcessGrid(handle, 1), {"0": 2}, {})
    assert list(exchange.ask([Request("0", "train", b"x")], 1.0)) == [Reply("0", error=shown)]


def test_ask_gives_up_when_nothing_comes():
    class Silent(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return []

    grid = Silent(one_by_one(fake_client_app()), 2)
    exchange = GridExchange(grid, {"0": 2, "1": 3}, {})
    assert list(exchange.ask([Request("0", "train"), Request("1", "train")], 0.1)) == []
