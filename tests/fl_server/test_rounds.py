"""The loop: one seed one history, rejection by name."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_server.attendance import Attendance
from fl_server.events import EventLog
from fl_server.exchange import Reply, Request
from fl_server.rounds import run_rounds
from fl_server.training import sample_clients
from tests.fl_server.fakes import (
    SPEC,
    FakeClient,
    FakeExchange,
    LossClient,
    QuietClient,
    content,
    make_blueprint,
    make_exchange,
    make_settings,
    read_history,
    run,
)
from vblora.errors import RunError
from vblora.frame import read_blob, section_bytes, write_blob

# --- A run ----------------------------------------------------------------------------------------


def test_history_and_summary(tmp_path: Path):
    exchange = make_exchange()
    summary = run(tmp_path, exchange, rounds=5)
    history = read_history(tmp_path)
    assert [record["round"] for record in history] == [0, 1, 2, 3, 4, 5]
    assert [record["score"] is not None for record in history] == [True, False, True, False, True, True]
    assert all((record["clients"], record["replies"]) == (3, 3) for record in history[1:])
    assert history[0]["train_loss"] is None
    assert history[0]["clients"] == 0
    assert history[1]["lr_scale"] == 1.0
    assert len({record["digest"] for record in history}) == 6

    scores = [record["score"] for record in history if record["score"] is not None]
    assert summary["score"] == {
        "metric": "accuracy",
        "start": scores[0],
        "final": scores[-1],
        "best": max(scores),
        "last3": pytest.approx(np.mean(scores[-3:])),
        "averaged": 3,
    }
    blueprint = make_blueprint()
    assert summary["parameters"]["sent"] == blueprint.stored_parameters
    assert summary["bytes"]["head"] == 4 * blueprint.head_size
    assert summary["bytes"]["up_total"] / 15 == pytest.approx(
        summary["bytes"]["up_per_client_round"], abs=0.5
    )
    assert summary["bytes"]["down_total"] == sum(record["bytes"]["down"] for record in history)
    assert summary["bytes"]["evaluate_total"] > 0
    keys = "adapter bytes clients data dropped model parameters rejected rounds score seconds seed versions"
    assert sorted(summary) == keys.split()
    assert (summary["adapter"], summary["rounds"], summary["clients"]) == ("vblora", 5, 5)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_score_before_training_counts_in_no_mean(tmp_path: Path):
    """Two evaluations of trained states: their mean. Without any, what there is."""
    summary = run(tmp_path, make_exchange(), rounds=2, own_scores=True)
    records = read_history(tmp_path)
    scores = [record["score"] for record in records[1:] if record["score"] is not None]
    assert records[0]["score"] is not None
    assert summary["score"]["last3"] == pytest.approx(np.mean(scores))
    assert summary["score"]["averaged"] == len(scores) < 3
    own = [record["own_mean"] for record in records[1:] if record["own_mean"] is not None]
    assert summary["score"]["own_last3"] == pytest.approx(np.mean(own))


def test_bytes_are_those_of_the_blobs(tmp_path: Path):
    sizes: list[int] = []
    sections: list[int] = []
    down: list[int] = []

    def watch(request: Request, reply: Reply) -> list[Reply]:
        if request.kind == "train":
            sizes.append(len(reply.blob))
            sections.append(section_bytes(reply.blob)["bank"])
            down.append(len(request.blob))
        return [reply]

    run(tmp_path, make_exchange(tamper=watch), rounds=1)
    traffic = read_history(tmp_path)[1]["bytes"]
    assert traffic["up"] == sum(sizes)
    assert sum(traffic["up_sections"].values()) == sum(sizes)
    assert traffic["up_sections"]["bank"] == sum(sections)
    assert traffic["down"] == sum(down)


def test_one_seed_one_history_in_any_order_of_arrival(tmp_path: Path):
    for name, order, seed in (("a", 0, 1), ("b", 7, 1), ("c", 0, 2)):
        run(tmp_path / name, make_exchange(order=order), seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["digest"] != content(tmp_path / "c")["digest"]


def test_files_of_a_finished_run(tmp_path: Path):
    run(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "adapter/adapter.safetensors",
        *(f"checkpoints/round-0000{number}.safetensors" for number in range(5)),
        *(f"checkpoints/server-0000{number}.safetensors" for number in range(5)),
        "history.jsonl",
        "summary.json",
    ]


def test_sampling_depends_on_seed_and_round_alone():
    names = [str(number) for number in range(20)]
    drawn = [tuple(sample_clients(names, 5, 1, number)) for number in range(200)]
    assert drawn[7] == tuple(sample_clients(names, 5, 1, 7))
    assert len(set(drawn)) > 190
    assert {name for sample in drawn for name in sample} == set(names)
    assert sample_clients(names, 20, 3, 4) == names
    assert sample_clients(names, 5, 2, 7) != list(drawn[7])


def test_more_than_ten_clients_evaluate_with_ten(tmp_path: Path):
    exchange = make_exchange(12)
    run(tmp_path, exchange, clients=12, rounds=1)
    evaluated = [name for kind, name in exchange.asked if kind == "evaluate"]
    assert sorted(evaluated, key=int) == [str(number) for number in range(10) for _ in range(2)]


def test_all_sites_evaluate_for_each_has_texts_of_its_own(tmp_path: Path):
    exchange = make_exchange(12, lasting=True)
    run(tmp_path, exchange, clients=12, rounds=1)
    assert (
        sorted({name for kind, name in exchange.asked if kind == "evaluate"}, key=int) == exchange.clients()
    )
    assert read_history(tmp_path)[1]["eval_examples"] == 10 * 8 + 2 * 9


@pytest.mark.parametrize("asked", [{"own_scores": True}, {"personal": "head"}])
def test_own_scores_of_all_clients(tmp_path: Path, asked: dict[str, Any]):
    """Client 5 n has no texts of its own: it is left out of the mean."""
    members = [QuietClient(str(number)) for number in range(13)]
    exchange = FakeExchange(members)
    summary = run(tmp_path, exchange, clients=13, rounds=1, **asked)
    assert sum(kind == "evaluate" for kind, _ in exchange.asked) == 26
    expected = {str(name): 1 / (name % 5) for name in range(13) if name % 5}
    for record in read_history(tmp_path):
        assert list(record["own"].items()) == list(expected.items())
        assert record["own_mean"] == pytest.approx(np.mean(list(expected.values())))
        assert record["own_std"] == pytest.approx(np.std(list(expected.values())))
    mean, spread = record["own_mean"], record["own_std"]
    told = {name: value for name, value in summary["score"].items() if name.startswith("own")}
    assert told == {"own_mean": mean, "own_std": spread, "own_last3": pytest.approx(mean)}
    again = run(tmp_path / "again", FakeExchange(members), clients=13, rounds=1)
    assert again["score"] == {name: value for name, value in summary["score"].items() if name not in told}


def test_own_scores_that_nobody_can_have_are_told_before_training(tmp_path: Path):
    def bare(request: Request, reply: Reply) -> list[Reply]:
        return [replace(reply, metrics={**reply.metrics, "own-examples": 0, "own-correct": 0})]

    with pytest.raises(RunError, match="no client has held-out texts of its own"):
        run(
            tmp_path,
            make_exchange(tamper=lambda *both: bare(*both) if both[1].metrics else [both[1]]),
            own_scores=True,
        )


def test_late_clients_train_once_the_bank_is_frozen(tmp_path: Path):
    exchange = FakeExchange([QuietClient(name) for name in "01234"])
    options = {"freeze_bank": 10, "late_clients": 2, "own_scores": True}
    summary = run(tmp_path, exchange, rounds=20, eval_every=20, **options)
    assert summary["score"]["own_late"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    trained = [name for kind, name in exchange.asked if kind == "train"]
    assert set(trained[:30]) == {"0", "1", "2"}
    assert set(trained[30:]) == {"0", "1", "2", "3", "4"}


def test_a_round_that_only_late_clients_came_for_is_not_waited_for(tmp_path: Path, no_sleep: list[float]):
    options = {"clients": 10, "clients_per_round": 5, "freeze_bank": 3, "late_clients": 5}
    with pytest.raises(
        RunError, match="round 1: 3 clients take part, the last 5 later, quorum is 1; bring more"
    ):
        run(tmp_path, make_exchange(3, lasting=True), **options)
    assert no_sleep == []


def test_metric_loss(tmp_path: Path):
    summary = run(tmp_path, FakeExchange([LossClient(str(number)) for number in range(5)]))
    scores = [record["score"] for record in read_history(tmp_path) if record["score"] is not None]
    assert scores[0] == read_history(tmp_path)[0]["eval_loss"]
    assert summary["score"]["best"] == min(scores)


# --- Too few, too late, too much --------------------------------------------------------------------


def test_a_length_that_no_blob_holds_is_refused_unread(tmp_path: Path):
    def lie(request: Request, reply: Reply) -> list[Reply]:
        if request.kind != "train" or request.client != "2":
            return [reply]
        header, (first, *rest) = read_blob(reply.blob)
        blob = bytearray(write_blob(header, [first, *rest])[:-4])
        length = len(first.payload).to_bytes(8, "little")
        at = blob.index(length)
        blob[at : at + 8] = (10**10).to_bytes(8, "little")
        return [replace(reply, blob=bytes(blob) + zlib.crc32(bytes(blob)).to_bytes(4, "little"))]

    run(tmp_path, make_exchange(tamper=lie), rounds=1, clients_per_round=5)
    (fault,) = read_history(tmp_path)[1]["rejected"]
    assert fault["client"] == "2"
    assert "declares 10000000000 bytes" in fault["reason"]


def test_an_update_of_an_earlier_round_is_refused(tmp_path: Path):
    kept: list[Reply] = []

    def replay(request: Request, reply: Reply) -> list[Reply]:
        if request.kind == "train" and request.client == "2":
            kept.append(reply)
            return [kept[0]]
        return [reply]

    run(tmp_path, make_exchange(tamper=replay), rounds=2, clients_per_round=5)
    first, second = read_history(tmp_path)[1:]
    assert first["rejected"] == []
    assert [fault["client"] for fault in second["rejected"]] == ["2"]
    assert "trained from version 0" in second["rejected"][0]["reason"]
    assert second["replies"] == 4


def test_a_reply_that_is_too_large_is_refused_unread(tmp_path: Path):
    def blow_up(request: Request, reply: Reply) -> list[Reply]:
        bad = request.kind == "train" and request.client == "2"
        return [replace(reply, blob=bytes(5000)) if bad else reply]

    run(tmp_path, make_exchange(tamper=blow_up), rounds=1, clients_per_round=5, max_reply=4999)
    (fault,) = read_history(tmp_path)[1]["rejected"]
    assert fault["reason"] == "training: its reply has 5000 bytes, expected 4999 at most (max-reply)"


def test_a_round_closes_when_enough_have_answered(tmp_path: Path):
    run(tmp_path, rounds=1, clients_per_round=5, close_at=0.6)
    record = read_history(tmp_path)[1]
    assert (record["clients"], record["replies"], len(record["missing"])) == (5, 3, 2)


def test_a_round_below_its_quorum_is_trained_again(tmp_path: Path, no_sleep: list[float]):
    failed: set[str] = set()

    def once(request: Request, reply: Reply) -> list[Reply]:
        if request.kind == "train" and request.config["round"] == 2 and request.client not in failed:
            failed.add(request.client)
            return [Reply(reply.client, error="no memory")]
        return [reply]

    options = {"clients_per_round": 5, "quorum": 4}
    run(tmp_path / "a", make_exchange(tamper=once, lasting=True), **options)
    run(tmp_path / "b", **options)
    found, expected = read_history(tmp_path / "a"), read_history(tmp_path / "b")
    assert len(found[2]["rejected"]) == 5
    assert [record["replies"] for record in found] == [record["replies"] for record in expected]
    assert found[-1]["digest"] == expected[-1]["digest"], "nothing was counted twice"
    assert len(no_sleep) == 1


def test_too_few_clients_pause_the_run_and_it_goes_on_when_they_are_back(
    tmp_path: Path, no_sleep: list[float], caplog: pytest.LogCaptureFixture
):
    exchange = make_exchange(lasting=True, away={"1", "3"})
    options = {"clients_per_round": 4, "quorum": 4, "wait_seconds": 600.0}
    with pytest.raises(RunError) as stop:
        run(tmp_path / "a", exchange, **options)
    assert str(stop.value) == (
        "round 1: 3 of 5 clients are there, expected 4; missing: 1, 3; paused after 600 seconds of waiting "
        "(wait-seconds): bring the clients back and go on with resume=true (fedvb: --resume)"
    )
    told = [entry.getMessage() for entry in caplog.records if "waiting" in entry.getMessage()]
    assert told[0].startswith("waiting, 600 s more at most: round 1: 3 of 5 clients are there")
    assert 9 <= len(told) <= 11, "once a minute"
    exchange.away.clear()
    run(tmp_path / "a", exchange, resume=True, **options)
    run(tmp_path / "b", **options)
    assert content(tmp_path / "a")["digest"] == content(tmp_path / "b")["digest"]


def test_who_is_away_is_not_asked(tmp_path: Path):
    exchange = make_exchange(lasting=True, away={"3"})
    run(tmp_path, exchange, rounds=1, clients_per_round=5)
    assert ("train", "3") not in exchange.asked
    assert ("evaluate", "3") not in exchange.asked
    assert read_history(tmp_path)[1]["clients"] == 4


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time: the clock moves on by what was slept."""
    slept: list[float] = []

    def initialise(self: Attendance) -> None:
        self.sleep, self.clock = slept.append, lambda: sum(slept)
        start(self)

    start = Attendance.__post_init__
    monkeypatch.setattr(Attendance, "__post_init__", initialise)
    return slept


def test_another_version_of_this_package_is_refused(tmp_path: Path):
    @dataclass
    class Older(FakeClient):
        def hello(self) -> dict[str, Any]:
            return {**super().hello(), "versions": {"fed-vblora": "0.0.1"}}

    exchange = FakeExchange([Older("0"), *(FakeClient(str(number)) for number in range(1, 5))])
    events = tmp_path / "events.jsonl"
    tmp_path.mkdir(exist_ok=True)
    run_rounds(exchange, make_settings(tmp_path, rounds=1), EventLog(tmp_path))
    (refused,) = json.loads(events.read_text().splitlines()[0])["refused"].values()
    assert refused.startswith("it runs fed-vblora 0.0.1, the server ")


def test_a_quorum_that_nobody_could_reach_is_told_at_the_start(tmp_path: Path):
    other = make_blueprint(replace(SPEC, seed=9))
    exchange = FakeExchange([FakeClient("0"), FakeClient("1"), FakeClient("2", other)])
    with pytest.raises(RunError, match="2 clients can take part, quorum is 3: 2: its adapter is"):
        run(tmp_path, exchange, clients=3, quorum=3)


def test_clients_that_all_drop_out_by_the_seed_are_not_waited_for(tmp_path: Path, no_sleep: list[float]):
    def drop(request: Request, reply: Reply) -> list[Reply]:
        gone = Reply(reply.client, metrics={"dropped": 1}, text="drew it")
        return [gone if request.kind == "train" else reply]

    with pytest.raises(RunError, match="round 1: no usable reply from 3 clients"):
        run(tmp_path, make_exchange(tamper=drop, lasting=True))
    assert no_sleep == []
