"""A federation of real processes on this machine: SuperLink, SuperNodes, trainers, over TLS."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from fl_client import trainer_pb2 as pb
from fl_client.thin import trainer_listens, trainer_status
from fl_server.keys import CONNECTION, make_keys
from tests.conftest import ROOT

__all__ = ["Federation", "Site", "free_ports"]

FEDVB = [sys.executable, "-m", "simulations.cli"]
PROGRAMS = Path(sys.executable).parent
RUNNING = "Uvicorn running on"  # what a server says when it listens


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@dataclass
class Site:
    """One site: its data, its trainer and its node.

    Attributes:
        number: of its key, from 1.
        data: its file.
        socket: of its trainer.
    """

    number: int
    data: Path
    socket: Path

    @property
    def name(self) -> str:
        return f"site-{self.number}"

    def status(self) -> pb.TrainerStatus:
        return trainer_status(self.socket)

    def sent(self, folder: Path) -> dict[str, bytes]:
        """The last update that its trainer has sent in each run, by the run's name."""
        found = folder.glob(f"state-{self.number}/memory/*/sent/0.blob")
        return {path.parent.parent.name: path.read_bytes() for path in found}


@dataclass
class Federation:
    """Processes that end with it, by their ids. Where a test fails, the ends of their logs are shown.

    Attributes:
        folder: short: sockets lie there.
        model: of every site.
        data: a file for each site.
        options: of `fedvb trainer`, for every site.
        host: that the sites and operators call the server by.
        machines: what a command is put behind to run on the machine of a process, by its name without number.
    """

    folder: Path
    model: Path
    data: Sequence[Path]
    options: Sequence[str] = ()
    host: str = "127.0.0.1"
    machines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port, *self.node_ports = free_ports(2 + len(self.data))
        self.keys = self.folder / "keys"
        self.sites = [
            Site(number, file, self.folder / f"{number}.sock") for number, file in enumerate(self.data, 1)
        ]
        make_keys(self.keys, len(self.data), [self.host], self.port)

    def __enter__(self) -> Federation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [*self.killed, *reversed(self.processes.values())]:
            _end(process)
        if error is not None:
            error.add_note(self.logs())

    # --- Processes -------------------------------------------------------------------

    def start(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own, with a log of its own."""
        environment = {key: value for key, value in os.environ.items() if key != "FLWR_HOME"}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.machines.get(name.partition("-")[0], ()), *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def kill(self, name: str) -> None:
        """SIGKILL to a process, not to those that it started: they end by themselves or with the test."""
        process = self.processes.pop(name)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        self.killed.append(process)

    def kill_child(self, name: str, program: str) -> None:
        """SIGKILL to the process that runs one of Flower's programs below another."""
        found = [
            child
            for child in psutil.Process(self.processes[name].pid).children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE
            and any(part.endswith(program) for part in child.cmdline()[:3])
        ]
        assert len(found) == 1, found
        found[0].kill()

    def start_all(self) -> None:
        """Everything: trainers, server, nodes, in the order that loses least time."""
        for site in self.sites:
            self.start_trainer(site)
        self.start_server()
        for site in self.sites:
            self.register(site)
            self.start_node(site)
        for site in self.sites:
            self.wait_until(lambda site=site: trainer_listens(site.socket), f"{site.name} trains")  # type: ignore[misc]

    def start_trainer(self, site: Site) -> None:
        self.start(
            f"trainer-{site.number}",
            [
                *(*FEDVB, "trainer", "--model", self.model, "--data", site.data, *self.options),
                *("--state", self.folder / f"state-{site.number}", "--socket", site.socket),
            ],
        )

    def start_server(self) -> None:
        before = self.log("server").count(RUNNING)
        self.start(
            "server",
            [
                *(*FEDVB, "server", "--keys", self.keys, "--port", str(self.port)),
                *("--host", "127.0.0.1" if self.host == "127.0.0.1" else "0.0.0.0"),
                *("--state", self.folder / "server"),
            ],
        )
        self.wait_until(lambda: self.log("server").count(RUNNING) > before, "the server listens")

    def start_node(
        self, site: Site, *, key: str = "", ca: str = "", port: int = 0, superlink: int = 0
    ) -> None:
        key = key or f"{self.keys}/node-{site.number}"
        port = port or self.node_ports[site.number - 1]
        self.start(
            f"node-{site.number}",
            [
                *(*FEDVB, "site", "--superlink", f"{self.host}:{superlink or self.port}", "--key", key),
                *("--ca", ca or f"{self.keys}/ca.crt", "--socket", site.socket, "--name", site.name),
                *("--state", self.folder / f"node-{site.number}"),
                *("--port", str(port)),
            ],
        )

    def restart_node(self, site: Site) -> None:
        """Start a killed node until it stays, as systemd would: Flower lets it in once it knows it dead."""
        name, end = f"node-{site.number}", time.monotonic() + 120
        while time.monotonic() < end:
            self.start_node(site)
            with suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(15)
                del self.processes[name]
                continue
            return
        raise AssertionError(f"{name} was not let in again")

    def register(self, site: Site) -> None:
        """Let a node in."""
        self.flwr("supernode", "register", f"{self.keys}/node-{site.number}.pub", CONNECTION)

    def flwr(self, *arguments: str | Path, machine: str = "server", code: int = 0) -> str:
        """Call Flower's command line on a machine; returns what it prints."""
        home = self.folder / "server" / "flwr" if machine == "server" else self.keys / "flwr"
        done = subprocess.run(
            [*self.machines.get(machine, ()), PROGRAMS / "flwr", *arguments],
            cwd=ROOT,
            env={**os.environ, "FLWR_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    # --- Runs ------------------------------------------------------------------------

    def submit(self, out: Path, **changes: Any) -> str:
        """Start a run; returns Flower's number of it."""
        given = {"model": "unused", "data": "unused", "out": str(out), "clients": len(self.sites)}
        given |= {"clients-per-round": len(self.sites)}
        given |= {name.replace("_", "-"): value for name, value in changes.items()}
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in given.items())
        told = self.flwr("run", ".", CONNECTION, "-c", text, "--format", "json")
        number: str = str(json.loads(told[told.index("{") :])["run-id"])
        return number

    def run(self, out: Path, seconds: float = 300, **changes: Any) -> dict[str, Any]:
        """Start a run and wait for its summary."""
        number = self.submit(out, **changes)
        self.wait_for_run(number, out, seconds)
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return summary

    def wait_for_run(self, number: str, out: Path, seconds: float = 300) -> None:
        """Wait for a run's summary; fails at once where Flower says that the run has ended without one."""
        looked = time.monotonic()

        def finished() -> bool:
            nonlocal looked
            if (out / "summary.json").exists():
                return True
            if time.monotonic() - looked > 15:
                looked = time.monotonic()
                state = self.flwr("list", CONNECTION, "--run-id", number, "--format", "json")
                assert "finished:failed" not in state, self.flwr("log", number, CONNECTION, "--show")
            return False

        self.wait_until(finished, f"run {number} has a summary", seconds)

    def wait_until(self, true: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait; fails where a process has ended meanwhile."""
        end = time.monotonic() + seconds
        while not true():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended with {process.returncode}"
            assert time.monotonic() < end, f"waited {seconds:g} s in vain: {what}"
            time.sleep(0.1)

    def logs(self, characters: int = 3000) -> str:
        """The ends of all logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-characters:]}")
        return "\n".join(parts)

    def log(self, name: str) -> str:
        """One log, whole."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process group in order, then at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
