"""Rounds over TLS between real processes: one SuperLink, SuperNodes with keys, resident trainers."""

from __future__ import annotations

import json
import os
import socket
import ssl
from pathlib import Path

import pytest

from tests.deploy.conftest import write_texts
from tests.deploy.federation import Federation

LABELS = ["--labels", "food,space,sport"]
SMALL = {"local_steps": 3, "batch_size": 4, "rank": 2}


def test_two_sites_train_a_round(folder: Path, minilm: Path):
    files = [
        write_texts(folder / "first.csv", ["food", "space"], 60, 1),
        write_texts(folder / "second.csv", ["sport"], 40, 2),
    ]
    with Federation(folder, minilm, files, LABELS, machines=without_torch(folder)) as federation:
        federation.start_all()
        out = folder / "run"
        summary = federation.run(out, rounds=1, **SMALL)
        assert summary["clients"] == 2
        assert (summary["rejected"], summary["rounds"]) == (0, 1)
        assert (summary["model"], summary["data"]) == ("model", "first.csv")
        last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
        assert (last["replies"], last["missing"], last["ignored"]) == (2, [], 0)
        assert last["examples"] == 2 * 3 * 4
        assert last["eval_examples"] == 10, "a tenth of each site's own texts"
        for site in federation.sites:
            assert site.status().bases_loaded == 1
            assert (folder / f"state-{site.number}" / "memory").is_dir()
        told = declare(federation, 10**10)
        assert told.startswith("HTTP/1.1 413"), "the gate stands before Flower"
        assert "10000000000 bytes, expected 8388608 at most" in told


def without_torch(folder: Path) -> dict[str, list[str]]:
    """Nodes, and the ClientApps that they start, on a machine where torch cannot be imported."""
    hook = folder / "without" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text("import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n")
    path = os.pathsep.join([str(hook.parent), os.environ.get("PYTHONPATH", "")])
    return {"node": ["env", f"PYTHONPATH={path}"]}


def declare(federation: Federation, length: int) -> str:
    """What the server answers to a node that announces so many bytes, before any of them."""
    context = ssl.create_default_context(cafile=str(federation.keys / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", federation.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as line,
    ):
        request = (
            f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        )
        line.sendall(request.encode())
        return b"".join(iter(lambda: line.recv(4096), b"")).decode()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_sites_and_five_rounds_load_three_bases(folder: Path, minilm: Path, assets: Path):
    folder = folder / "5"
    folder.mkdir()
    lines = (assets / "data" / "sst2" / "train.tsv").read_text().splitlines()
    files = []
    for number in range(3):
        path = folder / f"reviews-{number}.tsv"
        path.write_text("\n".join([lines[0], *lines[1 + 400 * number : 401 + 400 * number]]) + "\n")
        files.append(path)
    with Federation(folder, minilm, files) as federation:
        federation.start_all()
        summary = federation.run(folder / "run", seconds=500, rounds=5, eval_every=5, local_steps=5)
        assert summary["clients"] == 3
        assert (summary["rejected"], summary["rounds"]) == (0, 5)
        assert [site.status().bases_loaded for site in federation.sites] == [1, 1, 1]
        records = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
        assert all(record["replies"] == 3 for record in records[1:])
        print([round(record["seconds"], 1) for record in records])
