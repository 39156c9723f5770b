"""Replies that are not taken: damaged, impossible, or of one who tries to wreck the bank."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_server.exchange import Reply, Request
from tests.fl_server.fakes import (
    FakeClient,
    FakeExchange,
    LossClient,
    QuietClient,
    content,
    make_blueprint,
    make_exchange,
    read_history,
    run,
)
from vblora.errors import RunError
from vblora.files import load_state
from vblora.wire import decode_update, encode_update, initial

# --- Rejection ------------------------------------------------------------------------------------


def poison(blob: bytes, what: str) -> bytes:
    blueprint = make_blueprint()
    update = decode_update(blob, blueprint)
    if what == "nan":
        bank = update.dense["bank"].copy()
        bank[0, 0] = np.nan
        update = replace(update, dense={**update.dense, "bank": bank})
    elif what == "stale":
        update = replace(update, version=update.version + 1)
    elif what == "huge":
        update = replace(update, dense={**update.dense, "head": update.dense["head"] * np.float32(1e12)})
    return encode_update(update, blueprint)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply: replace(reply, blob=b"garbage"), "it is truncated"),
        (lambda reply: replace(reply, blob=reply.blob[:-9]), "checksum [0-9a-f]{8}, expected"),
        (lambda reply: replace(reply, blob=b""), "0 bytes"),
        (
            lambda reply: replace(reply, blob=poison(reply.blob, "nan")),
            "bank holds 1 numbers that are not finite",
        ),
        (lambda reply: replace(reply, blob=poison(reply.blob, "stale")), "trained from version 1"),
        (lambda reply: replace(reply, blob=poison(reply.blob, "huge")), "section head changes by up to"),
        (lambda reply: Reply(reply.client, error="out of memory"), "training: out of memory"),
    ],
)
def test_a_bad_reply_is_rejected_by_name_and_the_round_goes_on(tmp_path: Path, change, reason: str):
    def tamper(request: Request, reply: Reply) -> list[Reply]:
        bad = request.kind == "train" and request.client == "2" and request.config["round"] == 1
        return [change(reply) if bad else reply]

    def drop(request: Request, reply: Reply) -> list[Reply]:
        return [] if tamper(request, reply) != [reply] else [reply]

    options = {"clients_per_round": 5, "rounds": 2}
    summary = run(tmp_path / "bad", make_exchange(tamper=tamper), **options)
    first = read_history(tmp_path / "bad")[1]
    assert [fault["client"] for fault in first["rejected"]] == ["2"]
    assert re.search(reason, first["rejected"][0]["reason"])
    assert (first["clients"], first["replies"]) == (5, 4)
    assert summary["rejected"] == 1

    # What the others sent is not touched by it: the same state as if the client had not answered.
    run(tmp_path / "none", make_exchange(tamper=drop), **options)
    missing = read_history(tmp_path / "none")[1]
    assert missing["missing"] == ["2"]
    assert missing["digest"] == first["digest"]


def test_a_second_reply_is_ignored_and_counted(tmp_path: Path):
    def twice(request: Request, reply: Reply) -> list[Reply]:
        stranger = replace(reply, client="99")
        return [reply, reply, stranger] if request.kind == "train" else [reply]

    run(tmp_path / "twice", make_exchange(tamper=twice))
    run(tmp_path / "once")
    assert read_history(tmp_path / "twice")[1]["ignored"] == 6
    assert content(tmp_path / "twice")["digest"] == content(tmp_path / "once")["digest"]


def test_no_usable_reply_ends_the_run_with_reasons_and_it_can_go_on(tmp_path: Path):
    def fail(request: Request, reply: Reply) -> list[Reply]:
        if request.kind == "train" and request.config["round"] == 2:
            return [] if request.client == "0" else [Reply(reply.client, error="no memory")]
        return [reply]

    with pytest.raises(
        RunError, match="round 2: no usable reply from 5 clients: 0: no reply in time; 1: train"
    ):
        run(tmp_path / "a", make_exchange(tamper=fail), clients_per_round=5)
    run(tmp_path / "a", resume=True, clients_per_round=5)
    run(tmp_path / "b", clients_per_round=5)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"eval-examples": 3, "eval-loss-sum": float("nan"), "eval-correct": 1},
        {"eval-examples": 3, "eval-loss-sum": 1.0, "eval-correct": 4},
        {"eval-examples": float("inf"), "eval-loss-sum": 1.0, "eval-correct": 1},
        {"eval-examples": 3, "eval-loss-sum": 1.7e308, "eval-correct": 1},
        {"eval-examples": 3, "eval-loss-sum": -1e300, "eval-correct": 1},
    ],
)
def test_a_bad_evaluation_is_left_out(tmp_path: Path, metrics: dict[str, float]):
    def tamper(request: Request, reply: Reply) -> list[Reply]:
        bad = request.kind == "evaluate" and request.client == "1"
        return [Reply("1", metrics=metrics) if bad else reply]

    run(tmp_path, make_exchange(tamper=tamper), rounds=1)
    record = read_history(tmp_path)[0]
    assert [fault["client"] for fault in record["rejected"]] == ["1"]
    assert record["eval_examples"] == 4 * 8
    assert record["score"] is not None


def test_own_losses_that_cannot_be_are_left_out(tmp_path: Path):
    def tamper(request: Request, reply: Reply) -> list[Reply]:
        if request.kind == "evaluate" and request.client in "23":
            return [replace(reply, metrics={**reply.metrics, "own-loss-sum": 1.7e308})]
        return [reply]

    members = [LossClient(str(number)) for number in range(5)]
    run(tmp_path, FakeExchange(members, tamper), rounds=1, own_scores=True)
    record = read_history(tmp_path)[1]
    assert list(record["own"]) == ["1", "4"]
    assert [fault["client"] for fault in record["rejected"]] == ["2", "3"]


def test_nobody_can_evaluate(tmp_path: Path):
    def tamper(request: Request, reply: Reply) -> list[Reply]:
        return [Reply(reply.client, error="no test set")] if request.kind == "evaluate" else [reply]

    with pytest.raises(
        RunError, match="no client could evaluate the initial state: 0: evaluation: no test set"
    ):
        run(tmp_path, make_exchange(tamper=tamper))


@pytest.mark.parametrize("loss", [float("nan"), 1.7e308])
def test_a_loss_that_cannot_be_stays_out_of_the_mean(tmp_path: Path, loss: float):
    def tamper(request: Request, reply: Reply) -> list[Reply]:
        return [replace(reply, metrics={"train-loss": loss}) if request.client == "1" else reply]

    def none(request: Request, reply: Reply) -> list[Reply]:
        return [replace(reply, metrics={}) if request.kind == "train" else reply]

    lying = make_exchange(tamper=lambda q, r: tamper(q, r) if q.kind == "train" else [r])
    run(tmp_path / "a", lying, clients_per_round=5)
    run(tmp_path / "b", make_exchange(tamper=none))
    assert all(0 < record["train_loss"] < 2 for record in read_history(tmp_path / "a")[1:])
    assert all(record["train_loss"] is None for record in read_history(tmp_path / "b"))


# --- One client that tries to wreck the bank ------------------------------------------------------


def poisoned(request: Request, reply: Reply) -> list[Reply]:
    """Client 2 sends the opposite of its change, a thousand times as long, and claims many examples."""
    if request.kind != "train" or request.client != "2":
        return [reply]
    blueprint = make_blueprint()
    update = decode_update(reply.blob, blueprint)
    dense = {name: change * np.float32(-1e3) for name, change in update.dense.items()}
    return [replace(reply, blob=encode_update(replace(update, dense=dense, examples=100_000), blueprint))]


def moved(out: Path) -> float:
    """How far the bank has come from its beginning."""
    state, blueprint = load_state(out / "adapter" / "adapter.safetensors")
    return float(np.linalg.norm(state.dense["bank"] - initial(blueprint).dense["bank"]))


def test_a_poisoned_client_cannot_wreck_the_bank(tmp_path: Path):
    options = {"clients_per_round": 5, "rounds": 3}
    run(tmp_path / "honest", **options)
    run(tmp_path / "wrecked", make_exchange(tamper=poisoned), **options)
    run(tmp_path / "clipped", make_exchange(tamper=poisoned, order=3), clip_updates=1.5, **options)
    honest, wrecked, clipped = (moved(tmp_path / name) for name in ("honest", "wrecked", "clipped"))
    assert wrecked > 100 * honest
    assert clipped < 3 * honest
    record = read_history(tmp_path / "clipped")[1]
    assert record["clipped"] == ["2"]
    median, largest = record["norms"]["bank"]
    assert largest > 100 * median
    assert record["replies"] == 5


@pytest.mark.parametrize(
    ("options", "silent"),
    [
        ({"freeze_bank": 1}, "bank"),
        ({"logits_every": 2}, "logits"),
        ({"personal": "head,logits"}, "head, logits"),
    ],
)
def test_what_a_round_leaves_alone_nobody_changes(tmp_path: Path, options: dict[str, Any], silent: str):
    members = [*map(QuietClient, "0123"), FakeClient("4")]
    run(tmp_path, FakeExchange(members), rounds=2, clients_per_round=5, **options)
    second = read_history(tmp_path)[2]
    (fault,) = (fault for fault in second["rejected"] if fault["client"] == "4")
    assert fault["reason"] == f"update: changes {silent}, which is frozen or personal in this round"
    assert second["replies"] == 4


def test_clipping_leaves_honest_rounds_alone(tmp_path: Path):
    options = {"clients_per_round": 5, "rounds": 3}
    run(tmp_path / "plain", **options)
    run(tmp_path / "clipped", make_exchange(order=2), clip_updates=3.0, **options)
    assert content(tmp_path / "plain") == content(tmp_path / "clipped")
