"""Who takes part in a run, and what it is about."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fl_server.exchange import Kind, Reply, Request
from fl_server.observer import LogObserver
from fl_server.rounds import run_rounds
from tests.fl_server.fakes import (
    SPEC,
    FakeClient,
    FakeExchange,
    make_blueprint,
    make_exchange,
    make_settings,
    read_history,
    run,
)
from vblora.errors import RunError


def test_clients_that_do_not_fit_are_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    other = make_blueprint(replace(SPEC, topk=3))
    members = [FakeClient(str(number), other if number == 3 else make_blueprint()) for number in range(8)]

    def tamper(request: Request, reply: Reply) -> list[Reply]:
        if request.kind != "hello":
            return [reply]
        broken = {
            "1": [],
            "2": [replace(reply, text="{")],
            "4": [Reply("4", error="no data")],
            "6": [replace(reply, text="[" * 200_000)],
            "7": [replace(reply, text=" " * 5_000_000)],
        }
        return broken.get(request.client, [reply])

    summary = run(tmp_path, FakeExchange(members, tamper), clients=8)
    assert summary["clients"] == 2
    told = "\n".join(caplog.messages)
    assert "client 1 refused: no answer within 600 seconds" in told
    assert "client 2 refused: its answer is not JSON" in told
    assert "client 3 refused: its adapter is " in told
    assert "client 4 refused: no data" in told
    assert "client 6 refused: its answer is nested too deeply" in told
    assert "client 7 refused: its answer has 5000000 characters, expected 4194304 at most" in told


FORGED = "no\n2026-01-01 client 3 is fine\x1b[2J\x1b]0;owned\x07\u202e" + "x" * 9999


@pytest.mark.parametrize("kind", ["hello", "train", "evaluate"])
def test_nothing_that_a_client_says_forges_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
):
    def forge(request: Request, reply: Reply) -> list[Reply]:
        if request.kind != kind or request.client != "1":
            return [reply]
        if kind == "hello":
            lies: dict[str, Any] = {"fingerprint": FORGED, "versions": {FORGED: FORGED, "fed-vblora": FORGED}}
            return [replace(reply, text=json.dumps(json.loads(reply.text) | lies))]
        return [Reply("1", error=FORGED)]

    run(tmp_path, make_exchange(tamper=forge), rounds=1, clients_per_round=5)
    lines = [line for line in caplog.messages if "client 1" in line]
    assert lines
    assert all(line.isprintable() and len(line) < 700 for line in lines)
    for fault in read_history(tmp_path)[1]["rejected"]:
        assert fault["reason"].isprintable()


def test_a_drop_out_and_generated_texts_forge_no_line(tmp_path: Path):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install -e '.[text-scores]'")
    reasons: list[str] = []

    class Ear(LogObserver):
        def client_dropped(self, number: int, client: str, reason: str) -> None:
            reasons.append(reason)

        def reply_received(self, number: int, kind: Kind, client: str, fault: str, size: int = 0) -> None:
            reasons.append(fault)

    def forge(request: Request, reply: Reply) -> list[Reply]:
        if request.client != "1" or request.kind not in ("train", "evaluate"):
            return [reply]
        told = {"dropped": 1} if request.kind == "train" else reply.metrics
        return [replace(reply, blob=b"", metrics=told, text=FORGED)]

    settings = make_settings(tmp_path, rounds=1, clients_per_round=5, eval_generate=2)
    run_rounds(make_exchange(tamper=forge), settings, Ear())
    assert [reason.partition(" 2026")[0] for reason in reasons if "owned" in reason] == [
        "no",
        "evaluation: no",
    ]
    assert all(reason == "" or reason.isprintable() for reason in reasons)


def test_nobody_is_left(tmp_path: Path):
    def tamper(request: Request, reply: Reply) -> list[Reply]:
        return [replace(reply, text='{"fingerprint": 3, "versions": {}, "examples": 1}')]

    with pytest.raises(
        RunError, match="hello: none of 5 clients can take part: 0: its answer has fingerprint = 3"
    ):
        run(tmp_path, make_exchange(tamper=tamper))
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blueprint": "{}"}, "client 0: blueprint: not readable"),
        ({"blueprint": make_blueprint(replace(SPEC, seed=9)).to_json()}, "client 0: it describes adapter"),
        (
            {"metric": {"name": "bleu", "higher_is_better": True}},
            "its metric is 'bleu', expected one of accuracy",
        ),
        ({"metric": None}, "its answer has metric = None, expected dict"),
        ({"data": json.loads("[" * 500 + "]" * 500)}, "its answer is nested too deeply"),
        ({"blueprint": "[" * 200_000}, "client 0: blueprint: not readable"),
    ],
)
def test_a_description_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], reason: str):
    def tamper(request: Request, reply: Reply) -> list[Reply]:
        if request.kind == "describe":
            return [replace(reply, text=json.dumps(json.loads(reply.text) | change))]
        return [reply]

    with pytest.raises(RunError, match=f"describe: .*{reason}"):
        run(tmp_path, make_exchange(tamper=tamper))
