"""`flwr run .`: the same two apps on Flower's own simulation engine, with Ray, give the same run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from simulations.config import load_config
from simulations.simulate import simulate
from tests.conftest import ROOT
from tests.simulations.conftest import read_history, read_summary, small_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of `flwr run`: a home, ports and a temporary folder of its own, and no message home.

    `flwr run` leaves a SuperLink behind, detached. A script of its name tells its process id, to end it by.
    """
    programs = Path(sys.executable).parent
    told = tmp_path / "superlink.pid"
    script = tmp_path / "bin" / "flower-superlink"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho $$ > "{told}"\nexec "{programs}/flower-superlink" "$@"\n')
    script.chmod(0o755)
    ray = tempfile.mkdtemp(prefix="ray-")  # its sockets need a short path
    ports = _free_ports(2)
    yield {
        **os.environ,
        "PATH": os.pathsep.join([str(script.parent), str(programs), os.environ["PATH"]]),
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "RAY_TMPDIR": ray,
    }
    if told.exists():
        with suppress(ProcessLookupError):
            os.killpg(int(told.read_text()), signal.SIGTERM)
    shutil.rmtree(ray, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with closing(socket.socket()) as first, closing(socket.socket()) as second:
        sockets = (first, second)[:count]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run_flower(environment: dict[str, str], changes: dict[str, Any], supernodes: int) -> str:
    """Call `flwr run .` in the repository root; returns what it prints."""
    values = (f"'{value}'" if isinstance(value, str) else value for value in changes.values())
    command = [
        *("flwr", "run", ".", "--stream"),
        *("--federation-config", f"num-supernodes={supernodes} client-resources-num-cpus=1"),
        *("-c", " ".join(f"{name}={value}" for name, value in zip(changes, values, strict=True))),
    ]
    before = (ROOT / "pyproject.toml").read_bytes()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert (ROOT / "pyproject.toml").read_bytes() == before
    return done.stdout


def test_the_same_history_as_in_process(
    flower: dict[str, str], tiny_bert: Path, topics: Path, tmp_path: Path
):
    changes = {
        "model": str(tiny_bert),
        "data": str(topics),
        "out": str(tmp_path / "flower"),
        "clients": 3,
        "clients-per-round": 2,
        "rounds": 2,
        "local-steps": 3,
        "batch-size": 4,
    }
    told = run_flower(flower, changes, supernodes=3)
    assert (tmp_path / "flower" / "summary.json").exists(), told

    simulate({**small_config(tiny_bert, topics, tmp_path / "here"), **changes, "out": str(tmp_path / "here")})
    found, expected = read_history(tmp_path / "flower"), read_history(tmp_path / "here")
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs["score"] == ours["score"]
        if ours["round"]:
            assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-4)
        assert theirs["eval_loss"] == pytest.approx(ours["eval_loss"], rel=1e-4)
        same = (
            "round",
            "replies",
            "examples",
            "bytes",
            "lr_scale",
            "rejected",
            "dropped",
            "missing",
            "ignored",
        )
        assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
    assert {path.name for path in (tmp_path / "flower").iterdir()} == {
        path.name for path in (tmp_path / "here").iterdir()
    }
    assert load_config(tmp_path / "flower") | {"out": ""} == load_config(tmp_path / "here") | {"out": ""}
    assert read_summary(tmp_path / "flower")["bytes"] == read_summary(tmp_path / "here")["bytes"]
