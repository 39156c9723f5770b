"""The commands of servers and sites, up to where they turn into Flower's programs."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tomllib
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fl_server.gate import GateSettings
from simulations import watch
from tests.simulations.conftest import Run
from vblora.errors import RunError
from vblora.files import alone


@dataclass
class Became:
    """What processes would have turned into: arguments and environments; and the gates of servers."""

    calls: list[tuple[list[str], dict[str, str]]] = field(default_factory=list)
    gates: list[GateSettings] = field(default_factory=list)

    def after(self, option: str) -> str:
        """What follows an option in the last call."""
        arguments, _ = self.calls[-1]
        return arguments[arguments.index(option) + 1]


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> Became:
    made = Became()

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert Path(program).name == arguments[0]
        made.calls.append((arguments, environment))

    def superlink(arguments: Sequence[str], settings: GateSettings) -> None:
        made.calls.append((["flower-superlink", *arguments], dict(os.environ)))
        made.gates.append(settings)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr("simulations.superlink.run_superlink", superlink)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # a server sets some
    return made


@pytest.fixture
def port() -> int:
    """One that nobody listens on."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def test_server_and_site_use_the_keys(fedvb: Run, became: Became, tmp_path: Path, port: int):
    told = fedvb("keys", "--out", "keys", "--nodes", "2", "--host", "fed.example.org")
    assert (told.code, told.err) == (0, "")
    assert "FLWR_HOME=STATE/flwr flwr supernode register keys/node-2.pub fedvb" in told.out
    os.environ.pop("FLWR_HOME", None)
    assert fedvb("server", "--keys", "keys", "--port", port, "--operators", "10.0.0.0/8").code == 0
    server, environment = became.calls[-1]
    assert "--enable-supernode-auth" in server
    assert "--insecure" not in server
    assert became.after("--ssl-certfile") == "keys/server.pem"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent)), "it starts others by name"
    assert became.gates == [GateSettings(("10.0.0.0/8",))]
    config = tomllib.loads((tmp_path / "superlink" / "flwr" / "config.toml").read_text())
    assert environment["FLWR_HOME"] == str(tmp_path / "superlink" / "flwr")
    assert config["superlink"]["fedvb"] == {
        "address": f"127.0.0.1:{port}",
        "root-certificates": str(tmp_path / "keys" / "ca.crt"),
    }
    site = ("site", "--superlink", "h:8000", "--key", "keys/node-1", "--port", port)
    assert fedvb(*site, "--socket", "t.sock").code == 0
    assert "--insecure" not in became.calls[-1][0]
    assert became.after("--auth-supernode-private-key") == "keys/node-1"
    assert became.after("--root-certificates") == "keys/ca.crt"
    assert became.after("--node-config") == f'socket="{tmp_path}/t.sock"'
    own = ("--model", "./llama", "--data", "notes.csv", "--label-column", "verdict")
    assert fedvb(*site, "--name", "clinic a", *own).code == 0
    told_node = (
        'name="clinic a" model="./llama" data="notes.csv" label-column="verdict" '
        f'state="{tmp_path}/supernode/memory"'
    )
    assert became.after("--node-config") == told_node


def test_flowers_home_is_the_servers_own_or_somebodys_and_a_sites_always_its_own(
    fedvb: Run, became: Became, tmp_path: Path, port: int
):
    os.environ["FLWR_HOME"] = str(
        tmp_path / "superlink" / "flwr"
    )  # before there is one, as in docs/deploy.md
    assert fedvb("server", "--insecure", "--port", port).code == 0
    assert became.calls[-1][1]["FLWR_HOME"] == os.environ["FLWR_HOME"]
    assert f"127.0.0.1:{port}" in (tmp_path / "superlink" / "flwr" / "config.toml").read_text()
    site = ("site", "--insecure", "--superlink", "h:1", "--socket", "t", "--state", "mine", "--port", port)
    assert fedvb(*site).code == 0
    assert became.calls[-1][1]["FLWR_HOME"] == str(tmp_path / "mine" / "flwr")
    os.environ["FLWR_HOME"] = str(tmp_path / "home")
    assert fedvb("server", "--insecure", "--port", port, "--state", "other").code == 0
    assert became.calls[-1][1]["FLWR_HOME"] == str(tmp_path / "home")
    assert not (tmp_path / "other" / "flwr").exists()


def test_two_servers_on_one_state_are_refused(fedvb: Run, became: Became, tmp_path: Path, port: int):
    with alone(tmp_path / "superlink" / "lock", "here", "test", "wait"):
        told = fedvb("server", "--insecure", "--port", port)
    assert (told.code, became.calls) == (2, [])
    assert f"--state superlink: in use by another server (process {os.getpid()}); end that one" in told.err
    assert not (tmp_path / "superlink" / "flwr").exists()


def test_plain_text_only_when_asked_for(fedvb: Run, became: Became, port: int):
    assert "say --insecure" in fedvb("server").err
    assert "say --insecure" in fedvb("site", "--superlink", "h:8000", "--socket", "t.sock").err
    assert not became.calls
    for command in (("server",), ("site", "--superlink", "h:8000", "--socket", "t.sock")):
        told = fedvb(*command, "--insecure", "--port", port)
        assert told.code == 0
        assert "updates travel in plain text" in told.err
    assert all("--insecure" in arguments for arguments, _ in became.calls)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("server", "--keys", "."),
            "ca.crt: cannot be read (No such file or directory)",
        ),
        (("server", "--insecure", "--operators", "laptop"), "--operators is 'laptop', expected an address"),
        (("server", "--insecure", "--host", "203.0.113.7"), "cannot be listened on"),
        (("site", "--superlink", "h:1", "--socket", "t", "--key", "none"), "none: cannot be read"),
        (("site", "--superlink", "h", "--socket", "t"), "--superlink is 'h', expected HOST:PORT"),
        (("site", "--superlink", "h:1"), "neither --socket nor --data"),
        (("site", "--superlink", "h:1", "--data", "x.csv"), "--model and --data go together"),
        (("site", "--superlink", "h:1", "--socket", "t", "--name", 'a" x="b'), "expected no quotes"),
        (("site", "--superlink", "h:1", "--socket", "t", "--name", "x" * 65), "has 65 characters"),
        (("keys", "--out", "k", "--nodes", "0"), "--nodes is 0"),
        (("server", "--insecure", "--port", "70000"), "70000 is not in the range 1<=x<=65535"),
        (("site", "--superlink", "h:1", "--socket", "t", "--port", "0"), "0 is not in the range 1<=x<=65535"),
        (("watch", ".", "--prometheus", "70000"), "70000 is not in the range 1<=x<=65535"),
        (("status", "none"), "none: no run here"),
        (("server", "--insecure", "--state", "/dev/null/x"), "--state: /dev/null/x cannot be made (Not a"),
        (
            ("trainer", "--model", "m", "--data", "d", "--state", "/dev/null"),
            "/dev/null cannot be made (File",
        ),
        (
            ("trainer", "--model", "m", "--data", "d", "--state", "s", "--socket", "/dev/null"),
            "something else",
        ),
        (("status", ".", "--follow"), "fedvb watch follows runs"),
        (
            ("trainer", "--model", "m", "--data", "d", "--state", "s", "--max-steps", "-1"),
            "--max-steps is -1",
        ),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    fedvb: Run, became: Became, arguments: tuple[str, ...], reason: str
):
    told = fedvb(*arguments)
    assert (told.code, told.out, became.calls) == (2, "", [])
    assert reason in told.err.splitlines()[-1]
    assert "Traceback" not in told.err


def test_a_port_that_is_taken_is_named(fedvb: Run, became: Became, port: int):
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        for command in (
            ("server", "--insecure", "--host", "127.0.0.1", "--port", port),
            ("site", "--insecure", "--superlink", "h:1", "--socket", "t", "--port", port),
        ):
            told = fedvb(*command)
            assert told.code == 2
            assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in told.err
    assert became.calls == []


def test_a_certificate_that_ends_soon_is_told(
    fedvb: Run, became: Became, monkeypatch: pytest.MonkeyPatch, port
):
    assert fedvb("keys", "--out", "keys", "--nodes", "1").code == 0
    monkeypatch.setattr("simulations.operate.SOON", 826)
    told = fedvb("server", "--keys", "keys", "--port", port)
    assert told.code == 0
    assert "keys/server.pem ends in 824 days; fedvb keys makes another" in told.err


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
    assert told.out.splitlines()[5].split()[:3] == ["client", "last", "seen"]
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


def test_a_run_that_waits_for_its_clients_is_followed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(RunError, match="no run here"):
        watch.watch(tmp_path, [], follow=False)
    monkeypatch.setattr("time.sleep", lambda _: shutil.copytree(finished, tmp_path, dirs_exist_ok=True))
    assert watch.watch(tmp_path, [], follow=True) == 4


def test_what_watch_needs_is_named(fedvb: Run, finished: Path, monkeypatch: pytest.MonkeyPatch):
    assert 'needs the extra "monitor"' in " ".join(fedvb("watch", "--help").out.split())
    assert "name --tensorboard DIR, --prometheus PORT" in fedvb("watch", finished).err
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    told = fedvb("watch", finished, "--tensorboard", "board")
    assert (told.code, "pip install 'fed-vblora[monitor]'" in told.err) == (2, True)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    told = fedvb("watch", finished, "--prometheus", "9100")
    assert (told.code, "pip install 'fed-vblora[monitor]'" in told.err) == (2, True)
