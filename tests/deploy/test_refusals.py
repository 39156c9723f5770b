"""What is refused in a real federation: each by its own reason, while the run goes on."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client import trainer
from fl_client.questions import Answer, Question, Scalar
from fl_client.resident import Resident
from fl_client.site import OnStep
from fl_server.keys import CONNECTION, make_keys
from fl_server.status import read_status
from tests.deploy.conftest import write_texts
from tests.deploy.federation import Federation, Site
from tests.deploy.witness import read_records
from vblora.frame import read_blob, write_blob
from vblora.spec import Blueprint
from vblora.state import State
from vblora.wire import decode_update, encode_update

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

LABELS = "food,space,sport"
ROUNDS = 6
OPTIONS: dict[str, Any] = {
    "rounds": ROUNDS,
    "eval_every": ROUNDS,
    "local_steps": 5,
    "batch_size": 4,
    "rank": 2,
}


class Saboteur(Resident):
    """A registered site whose trainer answers every round but the last with another outrage."""

    def __init__(self, own: Mapping[str, Scalar], state: Path) -> None:
        super().__init__(own, state)
        self.first = b""

    def answer(self, question: Question, run: Mapping[str, Scalar], on_step: OnStep | None = None) -> Answer:
        found = super().answer(question, run, on_step)
        if question.kind != "train":
            return found
        assert self._site is not None
        number, blueprint = int(question.config["round"]), self._site.blueprint
        self.first = self.first or found.blob
        outrages = {
            1: lambda: found.blob[:-9],
            2: lambda: not_a_number(found.blob, blueprint, self.reference(question)),
            3: lambda: of_ten_gigabytes(found.blob),
            4: lambda: self.first,
            5: lambda: bytes(40_000_000),
        }
        return replace(found, blob=outrages.get(number, lambda: found.blob)())

    def reference(self, question: Question) -> State:
        """The state that a question has brought."""
        assert self._site is not None
        state = self._site.memory.state(read_blob(question.blob)[0].digest)
        assert state is not None
        return state


def not_a_number(blob: bytes, blueprint: Blueprint, reference: State) -> bytes:
    """The same update with one number spoilt, and whole: steps cannot hold it."""
    update = decode_update(blob, blueprint, reference)
    bank = update.dense["bank"].copy()
    bank[0, 0] = np.nan
    return encode_update(replace(update, dense={**update.dense, "bank": bank}, steps={}), blueprint)


def of_ten_gigabytes(blob: bytes) -> bytes:
    """The same blob, where the first section declares another length, sealed again."""
    header, (first, *rest) = read_blob(blob)
    body = bytearray(write_blob(header, [first, *rest])[:-4])
    at = body.index(len(first.payload).to_bytes(8, "little") + bytes(first.payload[:8]))
    body[at : at + 8] = (10**10).to_bytes(8, "little")
    return bytes(body) + zlib.crc32(bytes(body)).to_bytes(4, "little")


@pytest.fixture(scope="module")
def federation(folder: Path, tiny_bert: Path) -> Iterator[Federation]:
    files = [write_texts(folder / f"{n}.csv", LABELS.split(","), 50, n) for n in range(3)]
    with Federation(folder, tiny_bert, files, ["--labels", LABELS]) as made:
        *honest, bad = made.sites
        own = {"model": str(tiny_bert), "data": str(bad.data), "labels": LABELS}
        saboteur = Saboteur(own, folder / "saboteur")
        service = trainer._Service(saboteur, "tiny", "texts", threading.Event())
        server = trainer._listen(bad.socket, service)
        for site in honest:
            made.start_trainer(site)
        made.start_server()
        for site in made.sites:
            made.register(site)
            made.start_node(site)
        yield made
        server.stop(grace=None).wait()


@pytest.fixture(scope="module")
def out(federation: Federation, folder: Path) -> Path:
    """A run in which one site is a saboteur, finished."""
    out = folder / "run"
    federation.run(out, **OPTIONS)
    return out


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        pytest.param(1, "it was truncated or altered on the way", id="truncated blob"),
        pytest.param(2, "bank holds 1 numbers that are not finite", id="NaN update"),
        pytest.param(3, "declares 10000000000 bytes", id="declared length of 10 GB"),
        pytest.param(4, "trained from version 0", id="replayed old update"),
        pytest.param(5, "its reply has 40000000 bytes, expected", id="reply that is too large"),
    ],
)
def test_a_reply_is_refused_and_the_round_goes_on(out: Path, number: int, reason: str):
    record = read_records(out)[number]
    (fault,) = record["rejected"]
    assert fault["client"] == "site-3"
    assert reason in fault["reason"]
    assert (record["replies"], record["missing"]) == (2, [])


def test_who_is_honest_again_takes_part_again(out: Path):
    last = read_records(out)[-1]
    assert (last["round"], last["replies"], last["rejected"]) == (ROUNDS, 3, [])
    assert json.loads((out / "summary.json").read_text())["rejected"] == 5


def test_an_operator_sees_who_it_was(out: Path):
    found = read_status(out).clients
    assert [found[name].rejected for name in ("site-1", "site-2", "site-3")] == [0, 0, 5]
    assert "its reply has 40000000 bytes" in found["site-3"].reason


def test_an_unregistered_key_is_turned_away(federation: Federation, folder: Path, out: Path):
    make_keys(folder / "other", 1)
    first = federation.sites[0]
    stranger = Site(9, first.data, first.socket)
    federation.start_node(stranger, key=f"{folder}/other/node-1", port=federation.node_ports[-1])
    process = federation.processes.pop("node-9")
    assert process.wait(60) != 0
    assert "[code: 2004] Failed to activate SuperNode" in federation.log("node-9")
    assert "No SuperNode found with the given public key" in federation.log("server")
    online(federation)


def test_a_wrong_certificate_is_not_trusted(federation: Federation, folder: Path, out: Path):
    make_keys(folder / "authority", 1)
    first = federation.sites[0]
    doubter = Site(8, first.data, first.socket)
    key, ca = f"{federation.keys}/node-1", f"{folder}/authority/ca.crt"
    federation.start_node(doubter, key=key, ca=ca, port=federation.node_ports[-1])
    federation.killed.append(federation.processes.pop("node-8"))  # it may end by itself
    told = "certificate verify failed"
    federation.wait_until(lambda: told in federation.log("node-8").lower(), "a node doubts the server")
    online(federation)


def online(federation: Federation) -> None:
    """The three that belong here are there, nobody else."""
    told = federation.flwr("supernode", "list", CONNECTION, "--format", "json")
    assert told.count('"online"') == 3
