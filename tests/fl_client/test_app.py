"""The ClientApp of a deployed site: with a trainer, without one, and within the server's patience."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fl_client import trainer
from fl_client.app import handle
from fl_client.questions import Answer, Question, Scalar
from fl_client.resident import Resident
from fl_client.site import OnStep
from simulations.config import default_config
from simulations.grid import InProcessGrid
from tests.simulations.conftest import tiny_bert, topics  # noqa: F401 (fixtures)
from vblora.spec import Blueprint
from vblora.state import initial_state
from vblora.wire import encode_state


@pytest.fixture(autouse=True)
def _identity() -> None:
    """A message cannot be made before a grid has said who makes it."""
    InProcessGrid(lambda messages, contexts: [], 1)


class Told(Resident):
    """Remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__({"model": "m", "data": "d"}, Path("nowhere"))
        self.asked: list[Question] = []

    def answer(self, question: Question, run: Mapping[str, Scalar], on_step: OnStep | None = None) -> Answer:
        self.asked.append(question)
        return Answer(0, b"update", {"train-loss": 1.0, "steps": 3})


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def socket(told: Told, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "trainer.sock"
    server = trainer._listen(path, trainer._Service(told, "m", "d", threading.Event()))
    yield path
    server.stop(grace=None).wait()


def ask(
    kind: str,
    node: Mapping[str, Any],
    run: Mapping[str, Any],
    ttl: float = 600,
    blob: bytes = b"",
    config: Mapping[str, Any] | None = None,
) -> Message:
    content = RecordDict({"config": ConfigRecord(dict(config or {}))})
    if blob:
        content["blob"] = ConfigRecord({"blob": blob})
    message = Message(content, 2, kind, ttl=ttl)
    message.metadata.__dict__["_message_id"] = "1"
    (reply,) = handle([message], [Context(1, 2, dict(node), RecordDict(), dict(run))])
    return reply


@pytest.mark.parametrize(
    ("ttl", "given", "seconds"),
    [(600.0, 0.0, 540.0), (600.0, 30.0, 30.0), (60.0, 0.0, 45.0), (20.0, 0.0, 10.0), (60.0, 50.0, 45.0)],
)
def test_a_site_stops_in_time_to_send_what_it_has(
    socket: Path, told: Told, ttl: float, given: float, seconds: float
):
    config = {"round": 1, **({"seconds": given} if given else {})}
    reply = ask("train", {"socket": str(socket)}, {}, ttl, config=config)
    assert reply.content["text"]["steps"] == 3
    (question,) = told.asked
    assert question.config["seconds"] == pytest.approx(seconds, abs=1)


def test_a_site_whose_trainer_is_away_says_so_and_reads_nothing(tmp_path: Path):
    reply = ask("query.hello", {"socket": str(tmp_path / "none.sock"), "name": "a"}, {"data": "/etc/passwd"})
    assert reply.error.reason == "trainer: none runs at this site"


@pytest.fixture
def alone(tiny_bert: Path, topics: Path, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    """A node that names model and data, and the socket of a trainer that does not run."""
    own = {"model": str(tiny_bert), "data": str(topics), "state": str(tmp_path / "memory")}
    return {**own, "socket": str(tmp_path / "none.sock"), "name": "clinic"}


def test_without_a_trainer_the_site_trains_in_this_process(alone: dict[str, Any], tmp_path: Path):
    run = {**default_config(), "local-steps": 2, "batch-size": 4, "data": "the server's", "clients": 9}
    run |= {"text-column": "label", "label-column": "site", "eval-split": "test"}
    described = json.loads(ask("query.describe", alone, run).content["text"]["text"])
    assert (described["model"], described["data"]) == ("tiny-bert", "topics.csv")
    blueprint = Blueprint.from_json(described["blueprint"])
    assert blueprint.labels == ("food", "space", "sport"), "not what the run would read as labels"
    blob = encode_state(initial_state(blueprint), blueprint)
    config = {"round": 1, "lr-scale": 1.0, "run": "a"}
    reply = ask("train", alone, run, blob=blob, config=config)
    assert reply.content["text"]["steps"] == 2
    assert reply.content["text"]["client"] == "clinic"
    assert (tmp_path / "memory" / "a" / "sent" / "0.blob").read_bytes() == reply.content["text"]["blob"]


def test_loading_takes_of_the_time_to_train(alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    asked: list[Question] = []

    def answer(site: None, questions: list[Question]) -> Iterator[Answer]:
        asked.extend(questions)
        yield Answer(0, text="here")

    monkeypatch.setattr("fl_client.opening.open_site", lambda settings: time.sleep(0.5))
    monkeypatch.setattr("fl_client.serve.answer", answer)
    for kind, seconds in (("train", 0), ("train", 5.0), ("query.hello", 0)):
        config = {"round": 1, "seconds": seconds}
        assert ask(kind, alone, default_config(), 20.0, config=config).content["text"]["text"] == "here"
    assert 8 < float(asked[0].config["seconds"]) <= 9.5
    assert asked[1].config["seconds"] == 5, "of training alone: what the server waits for is longer"
    assert not asked[2].config["seconds"]


def test_what_fails_without_a_trainer_is_told_discreetly(
    alone: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    run = {**default_config(), "labels": "good,bad"}
    reply = ask("query.hello", alone, run)
    assert reply.error.reason == "its data does not fit the run; the site's own log says why"
    assert "not among the 2 of --labels" in caplog.text
