"""The commands of servers and sites, up to where they turn into Flower's programs."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from simulations import watch
from tests.simulations.conftest import Run


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What processes would have turned into: arguments and environment."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def execve(program: str, arguments: list[str], environment: dict[str, Any]) -> None:
        assert Path(program).name == arguments[0]
        calls.append((arguments, environment))

    monkeypatch.setattr(os, "execve", execve)
    return calls


def test_server_and_site_use_the_keys(
    fedvb: Run, became: list[tuple[list[str], dict[str, str]]], tmp_path: Path
):
    told = fedvb("keys", "--out", "keys", "--nodes", "2", "--host", "fed.example.org")
    assert (told.code, told.err) == (0, "")
    assert "flwr supernode register keys/node-2.pub fedvb" in told.out
    assert fedvb("server", "--keys", "keys").code == 0
    assert fedvb("site", "--superlink", "h:8000", "--key", "keys/node-1", "--socket", "t.sock").code == 0
    (server, environment), (site, _) = became
    assert "--enable-supernode-auth" in server
    assert server[server.index("--ssl-certfile") + 1] == "keys/server.pem"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert site[site.index("--auth-supernode-private-key") + 1] == "keys/node-1"
    assert site[site.index("--root-certificates") + 1] == "keys/ca.crt"
    assert site[site.index("--node-config") + 1] == f'socket="{tmp_path}/t.sock"'
    assert not {"--insecure"} & {*server, *site}


def test_plain_text_only_when_asked_for(fedvb: Run, became: list[tuple[list[str], dict[str, str]]]):
    assert "say --insecure" in fedvb("server").err
    assert "say --insecure" in fedvb("site", "--superlink", "h:8000", "--socket", "t.sock").err
    assert "no such file" in fedvb("site", "--superlink", "h:1", "--socket", "t", "--key", "none").err
    assert "has no ca.crt" in fedvb("server", "--keys", ".").err
    assert not became
    for command in (("server",), ("site", "--superlink", "h:8000", "--socket", "t.sock")):
        told = fedvb(*command, "--insecure")
        assert told.code == 0
        assert "updates travel in plain text" in told.err
    assert all("--insecure" in arguments for arguments, _ in became)


def test_a_trainer_needs_a_sites_own_text(fedvb: Run):
    told = fedvb("trainer", "--model", "minilm", "--data", "docstrings", "--state", "s")
    assert told.code == 2
    assert "a site trains on its own text" in told.err
    told = fedvb("trainer", "--model", "minilm", "--data", "none.csv", "--state", "s")
    assert (told.code, told.out) == (2, "")
    assert told.err.splitlines()[-1] == "fedvb: none.csv: no such file or folder"


def test_status_of_a_run_and_of_nothing(fedvb: Run, finished: Path, tmp_path: Path):
    told = fedvb("status", finished)
    assert (told.code, told.err) == (0, "")
    assert told.out.splitlines()[0] == "run      finished"
    assert "on disk  round 3" in told.out
    told = fedvb("status", tmp_path / "none")
    assert (told.code, "no run here" in told.err) == (2, True)


def test_watch_publishes_every_round_once(fedvb: Run, finished: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    assert fedvb("watch", finished, "--tensorboard", tmp_path / "board").out == "4 rounds\n"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.step for event in board.Scalars("bytes/up")] == [0, 1, 2, 3]
    assert len(board.Scalars("norm/bank/median")) == 3


def test_prometheus_tells_the_last_round(finished: Path):
    pytest.importorskip("prometheus_client")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert watch.watch(finished, [watch.prometheus(port)], follow=True) == 4
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        told = page.read().decode()
    assert "fedvb_round 3.0" in told
    assert "fedvb_clients_replied 2.0" in told


def test_what_watch_needs_is_named(fedvb: Run, finished: Path, monkeypatch: pytest.MonkeyPatch):
    assert "name --tensorboard DIR, --prometheus PORT" in fedvb("watch", finished).err
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    told = fedvb("watch", finished, "--tensorboard", "board")
    assert (told.code, "pip install 'fed-vblora[monitor]'" in told.err) == (2, True)
