"""The commands of servers and sites, up to where they turn into Flower's programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

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
