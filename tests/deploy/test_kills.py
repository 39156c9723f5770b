"""SIGKILL to each process of a federation in the middle of a round: the run comes to its last round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_client.thin import trainer_listens
from tests.deploy.conftest import write_texts
from tests.deploy.federation import Federation, Site
from tests.deploy.witness import Witness, read_records
from vblora.errors import RunError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

ROUNDS = 3
OPTIONS: dict[str, Any] = {
    "rounds": ROUNDS,
    "eval_every": ROUNDS,
    "local_steps": 600,
    "batch_size": 4,
    "rank": 2,
    "max_length": 32,
    "timeout_seconds": 200.0,
    "wait_seconds": 200.0,
}


@pytest.fixture(scope="module")
def federation(folder: Path, tiny_bert: Path) -> Iterator[Federation]:
    labels = [["food", "space"], ["sport"], ["food", "sport"]]
    files = [write_texts(folder / f"{n}.csv", names, 50, n) for n, names in enumerate(labels)]
    with Federation(folder, tiny_bert, files, ["--labels", "food,space,sport", "--max-length", "32"]) as made:
        made.start_all()
        yield made


@pytest.fixture
def out(folder: Path, request: pytest.FixtureRequest) -> Path:
    return folder / f"run-{request.node.name}"


@pytest.fixture(autouse=True)
def _told(federation: Federation, request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a test fails, show the logs."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        print(federation.logs(6000))


def wait_for_training(federation: Federation, site: Site, out: Path, number: int = 1) -> None:
    """Wait until a site is in the midst of training in a round."""

    def at_work() -> bool:
        try:
            status = site.status()
        except RunError:
            return False
        return len(read_records(out)) == number and status.busy.startswith("train") and status.done > 20

    federation.wait_until(at_work, f"{site.name} trains in round {number}", 120)


@pytest.fixture
def witness(federation: Federation) -> Iterator[Witness]:
    with Witness(federation) as made:
        yield made


def check_run(out: Path, witness: Witness) -> list[dict[str, Any]]:
    """Every round once, every update in it once, and the bank that the surviving updates give."""
    found = read_records(out)
    assert [record["round"] for record in found] == list(range(ROUNDS + 1))
    for record in found[1:]:
        assert record["ignored"] == 0
        assert record["replies"] <= 3
        assert record["examples"] == record["replies"] * OPTIONS["local_steps"] * OPTIONS["batch_size"]
    assert len({record["digest"] for record in found}) == ROUNDS + 1
    assert json.loads((out / "summary.json").read_text())["rounds"] == ROUNDS
    witness.check_bank(out)
    return found


def test_a_client_app(federation: Federation, out: Path, witness: Witness):
    number = federation.submit(out, **OPTIONS)
    site = federation.sites[0]
    wait_for_training(federation, site, out)
    federation.kill_child("node-1", "flwr-clientapp")
    federation.wait_for_run(number, out)
    found = check_run(out, witness)
    (fault,) = found[1]["rejected"]
    assert (found[1]["replies"], fault["client"]) == (2, site.name)
    assert [record["replies"] for record in found[2:]] == [3, 3]
    assert "dropped at step" in federation.log("trainer-1")
    assert site.status().bases_loaded == 1


def test_a_trainer(federation: Federation, out: Path, witness: Witness):
    number = federation.submit(out, **OPTIONS)
    site = federation.sites[1]
    wait_for_training(federation, site, out)
    federation.kill("trainer-2")
    federation.start_trainer(site)
    federation.wait_for_run(number, out)
    found = check_run(out, witness)
    (fault,) = found[1]["rejected"]
    assert (found[1]["replies"], fault["client"]) == (2, site.name)
    assert "it does not run, or died at work" in fault["reason"]
    assert found[3]["replies"] == 3
    assert trainer_listens(site.socket)


def test_a_node(federation: Federation, out: Path, witness: Witness):
    number = federation.submit(out, **OPTIONS)
    site = federation.sites[2]
    wait_for_training(federation, site, out)
    federation.kill("node-3")
    federation.restart_node(site)
    federation.wait_for_run(number, out)
    found = check_run(out, witness)
    assert found[1]["replies"] >= 2
    assert found[3]["replies"] == 3


@pytest.mark.parametrize("what", ["the server app", "the superlink"])
def test_resumed_after(what: str, federation: Federation, out: Path, witness: Witness):
    federation.submit(out, **OPTIONS)
    wait_for_training(federation, federation.sites[0], out, 2)
    if what == "the superlink":
        federation.kill_child("server", "flwr-serverapp")
        federation.kill("server")
        federation.start_server()
    else:
        federation.kill_child("server", "flwr-serverapp")
    kept = (out / "history.jsonl").read_text()
    number = federation.submit(out, resume=True, **OPTIONS)
    federation.wait_for_run(number, out)
    check_run(out, witness)
    assert (out / "history.jsonl").read_text().startswith(kept)
    assert all(site.status().bases_loaded == 1 for site in federation.sites)
