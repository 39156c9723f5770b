"""The in-process grid, and the real ServerApp over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_client.app import handle
from fl_server.app import GridExchange, app
from fl_server.config_file import read_config
from fl_server.exchange import Reply, Request
from fl_server.rounds import run_rounds
from simulations.grid import InProcessGrid, one_by_one, run_server_app
from tests.fl_server.fakes import FakeClient, make_exchange, make_settings, read_history
from vblora.errors import ConfigError, DataError, RunError

TYPES = {"query.hello": "hello", "query.describe": "describe", "train": "train", "evaluate": "evaluate"}


def to_message(reply: Reply, message: Message) -> Message:
    told = {**reply.metrics, "text": reply.text, "client": reply.client, "blob": reply.blob}
    return Message(RecordDict({"text": ConfigRecord(told)}), reply_to=message)


def answer(message: Message, context: Context) -> Message:
    """What a ClientApp does, with a fake client."""
    record = message.content.get("blob")
    request = Request(
        client="",
        kind=TYPES[message.metadata.message_type],
        blob=bytes(record["blob"]) if record else b"",
        config=dict(message.content["config"]),
    )
    return to_message(FakeClient(str(context.node_config["partition-id"])).answer(request), message)


def fake_client_app() -> ClientApp:
    client_app = ClientApp()
    for decorator in (client_app.train(), client_app.evaluate(), client_app.query("hello")):
        decorator(answer)
    client_app.query("describe")(answer)
    return client_app


def run_config(out: Path, **options: Any) -> dict[str, Any]:
    names = {
        "rounds",
        "clients",
        "clients_per_round",
        "seed",
        "eval_every",
        "wait_seconds",
        "resume",
        *options,
    }
    settings = make_settings(out, **options)
    return {"out": str(out)} | {name.replace("_", "-"): getattr(settings, name) for name in sorted(names)}


def messages(nodes: Iterable[int], kind: str = "train") -> list[Message]:
    return [Message(RecordDict({"config": ConfigRecord({})}), node, kind) for node in nodes]


# --- The server app -------------------------------------------------------------------------------


def test_server_app_and_fake_exchange_give_one_history(tmp_path: Path):
    config = run_config(tmp_path / "grid")
    run_server_app(app, InProcessGrid(one_by_one(fake_client_app()), 5, config), config)
    run_rounds(make_exchange(), make_settings(tmp_path / "fake"))
    assert read_history(tmp_path / "grid") == read_history(tmp_path / "fake")
    assert (tmp_path / "grid" / "summary.json").exists()


def test_resume_over_a_new_grid(tmp_path: Path):
    def stopping(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message, context in zip(messages, contexts, strict=True):
            if message.content["config"].get("round") == 3:
                raise KeyboardInterrupt
            yield answer(message, context)

    config = run_config(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run_server_app(app, InProcessGrid(stopping, 5, config), config)
    grid = InProcessGrid(one_by_one(fake_client_app()), 5, config)
    run_server_app(app, grid, config | {"resume": True})
    run_rounds(make_exchange(), make_settings(tmp_path / "b"))
    assert read_history(tmp_path / "a") == read_history(tmp_path / "b")


def test_a_run_goes_on_without_a_site_that_never_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def stopping(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message, context in zip(messages, contexts, strict=True):
            if message.content["config"].get("round") == 3:
                raise KeyboardInterrupt
            yield answer(message, context)

    config = run_config(tmp_path, wait_seconds=0, quorum=2)
    with pytest.raises(KeyboardInterrupt):
        run_server_app(app, InProcessGrid(stopping, 5, config), config)
    resumed = config | {"resume": True}
    with pytest.raises(RunError, match="1 of 5 clients came"):
        run_server_app(app, InProcessGrid(one_by_one(fake_client_app()), 1, config), resumed)
    run_server_app(app, InProcessGrid(one_by_one(fake_client_app()), 3, config), resumed)
    assert "3 of 5 clients came within 0 seconds: going on" in caplog.text
    assert [record["clients"] for record in read_history(tmp_path)] == [0, 3, 3, 3, 3]


def test_errors_come_out_of_the_server_app_and_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    grid = InProcessGrid(one_by_one(fake_client_app()), 5)
    with pytest.raises(ConfigError):
        run_server_app(app, grid, {"rounds": 0})
    assert caplog.messages == ["server settings: rounds is 0, expected 1 to 1000000"]
    with pytest.raises(RunError, match="5 of 6 clients came within 0 seconds"):
        run_server_app(app, grid, run_config(tmp_path, clients=6, wait_seconds=0))


def test_a_taken_place_is_refused_before_anyone_is_asked(tmp_path: Path):
    def never(messages: list[Message], contexts: list[Context]) -> list[Message]:
        raise AssertionError("a client was asked")

    (tmp_path / "history.jsonl").touch()
    with pytest.raises(RunError, match="taken by a run"):
        run_server_app(app, InProcessGrid(never, 5), run_config(tmp_path))


def test_a_run_that_is_refused_leaves_nothing(tmp_path: Path):
    config = run_config(tmp_path / "run") | {"start": "elsewhere"}
    with pytest.raises(RunError, match="the server goes on from elsewhere, the clients from the seed"):
        run_server_app(app, InProcessGrid(one_by_one(fake_client_app()), 5, config), config)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_resumed_keeps_its_config(tmp_path: Path):
    config = run_config(tmp_path, rounds=2)
    run_server_app(app, InProcessGrid(one_by_one(fake_client_app()), 5, config), config)
    kept = read_config(tmp_path)
    assert kept == {key: value for key, value in config.items() if key not in ("out", "resume")}
    shorter = config | {"rounds": 1, "resume": True}
    with pytest.raises(RunError, match="the run has finished round 2, but rounds is 1"):
        run_server_app(app, InProcessGrid(one_by_one(fake_client_app()), 5, config), shorter)
    assert read_config(tmp_path) == kept


def test_observer_of_the_grid_is_told(tmp_path: Path):
    told: list[str] = []

    class Observer:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: told.append(name)

    config = run_config(tmp_path, rounds=1, clients_per_round=2)
    run_server_app(app, InProcessGrid(one_by_one(fake_client_app()), 5, observer=Observer()), config)
    evaluated = ["reply_received"] * 5 + ["round_finished"]
    assert told == [
        "run_started",
        *evaluated,
        "round_started",
        "reply_received",
        "reply_received",
        *evaluated,
    ]


# --- The grid itself ------------------------------------------------------------------------------


def test_a_group_is_handled_together_in_order_and_contexts_last():
    groups: list[tuple[str, list[int]]] = []

    def handle(messages: list[Message], contexts: list[Context]) -> list[Message]:
        groups.append((messages[0].metadata.message_type, [context.node_id for context in contexts]))
        for context in contexts:
            context.state.setdefault("seen", MetricRecord({"times": 0}))["times"] += 1
        return [Message(RecordDict(), reply_to=message) for message in reversed(messages)]

    grid = InProcessGrid(handle, 10_000, {"seed": 3})
    replies = list(grid.send_and_receive([*messages([9, 4]), *messages([4], "evaluate"), *messages([7])]))
    assert groups == [("train", [9, 4, 7]), ("evaluate", [4])]
    assert [reply.metadata.src_node_id for reply in replies] == [7, 4, 9, 4]
    assert grid.context(4).state["seen"]["times"] == 2
    assert grid.context(4).node_config == {"partition-id": 2, "num-partitions": 10_000}
    assert grid.context(4).run_config == {"seed": 3}
    assert len(grid._contexts) == 3
    assert len(list(grid.get_node_ids())) == 10_000


def test_an_error_of_ours_concerns_one_client_and_others_go_through():
    sizes: list[int] = []

    def handle(messages: list[Message], contexts: list[Context]) -> list[Message]:
        sizes.append(len(messages))
        if any(context.node_id == 3 for context in contexts):
            raise DataError("client 1 has no rows")
        return [Message(RecordDict(), reply_to=message) for message in messages]

    grid = InProcessGrid(handle, 3)
    replies = list(grid.send_and_receive(messages([2, 3, 4])))
    assert sizes == [3, 1, 1, 1]
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.reason == "client 1 has no rows"

    def broken(messages: list[Message], contexts: list[Context]) -> list[Message]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        InProcessGrid(broken, 3).send_and_receive(messages([2]))


def test_a_lazy_handle_is_not_asked_again_for_what_it_gave():
    calls: list[list[int]] = []

    def handle(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        calls.append([context.node_id for context in contexts])
        for message, context in zip(messages, contexts, strict=True):
            if context.node_id == 3:
                raise DataError("no")
            yield Message(RecordDict(), reply_to=message)

    replies = list(InProcessGrid(handle, 3).send_and_receive(messages([2, 3, 4])))
    assert calls == [[2, 3, 4], [3], [4]]
    assert [reply.has_error() for reply in replies] == [False, True, False]


def test_no_reply_and_two_replies():
    def handle(messages: list[Message], contexts: list[Context]) -> list[Message]:
        return [Message(RecordDict(), reply_to=messages[0])] * 2

    replies = list(InProcessGrid(handle, 3).send_and_receive(messages([2, 3])))
    assert [reply.has_error() for reply in replies] == [False, True]


def test_what_nobody_pulls_is_not_worked_on():
    seen: list[int] = []

    def handle(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for message, context in zip(messages, contexts, strict=True):
            seen.append(context.node_id)
            yield Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(handle, 300)
    old = list(grid.push_messages(messages(range(2, 202))))
    assert len(list(grid.pull_messages(old))) == 64
    new = list(grid.push_messages(messages([250])))
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(new)] == [250]
    assert seen == [*range(2, 66), 250]
    assert list(grid.pull_messages(old)) == []


@pytest.mark.parametrize("size", [0, 1 << 20, (1 << 20) + 1])
def test_small_blobs_are_one_object_and_large_ones_an_array(size: int):
    """Both ways; each object costs a kilobyte of headers on the socket."""
    from fl_client.questions import Answer, Question

    blob, large = bytes(size), size > 1 << 20
    seen: list[Question] = []

    def answers(questions: Iterable[Question]) -> Iterator[Answer]:
        for question in questions:
            seen.append(question)
            yield Answer(question.client, blob, {"steps": 3}, "text")

    def both(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        for reply in handle(messages, contexts, answers):
            assert ("blob" in reply.content.array_records) == large
            assert len(reply.content) == 1 + large
            yield reply

    grid = InProcessGrid(both, 1, {"seed": 0})
    exchange = GridExchange(grid, {"0": next(iter(grid.get_node_ids()))}, {})
    (reply,) = exchange.ask([Request("0", "train", blob, {"round": 1})], 10)
    assert (reply.blob, reply.metrics, reply.text) == (blob, {"steps": 3}, "text")
    assert (seen[0].blob, seen[0].config) == (blob, {"round": 1})
