"""docs/deploy.md on two machines: network namespaces, joined by a cable, as only root can make them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_server.keys import CONNECTION, make_keys
from tests.deploy.conftest import write_texts
from tests.deploy.federation import Federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

SERVER, SITE = "fedvb-server", "fedvb-site"
ADDRESS = {SERVER: "10.77.0.1", SITE: "10.77.0.2"}


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, list[str]]]:
    """What a command is put behind to run on the server's machine, or on the site's."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, to make network namespaces")
    try:
        for name in ADDRESS:
            ip("netns", "add", name)
        ip("link", "add", "fedvb0", "type", "veth", "peer", "name", "fedvb1")
        for name, end in zip(ADDRESS, ("fedvb0", "fedvb1"), strict=True):
            ip("link", "set", end, "netns", name)
            for what in (("link", "set", "lo", "up"), ("link", "set", end, "up")):
                ip("-n", name, *what)
            ip("-n", name, "addr", "add", f"{ADDRESS[name]}/24", "dev", end)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel makes no such namespaces: {error.stderr.decode().strip()}")
    else:
        server, site = (["ip", "netns", "exec", name] for name in ADDRESS)
        yield {"server": server, "trainer": site, "node": site}
    finally:
        for name in ADDRESS:
            ip("netns", "del", name, check=False)


def test_a_round_and_a_stranger(machines: dict[str, list[str]], folder: Path, minilm: Path):
    texts = write_texts(folder / "notes.csv", ["food", "space"], 40, 1)
    with Federation(folder, minilm, [texts], host=ADDRESS[SERVER], machines=machines) as federation:
        federation.start_all()
        out = folder / "run"
        federation.run(out, rounds=1, local_steps=2, batch_size=4)
        assert json.loads((out / "history.jsonl").read_text().splitlines()[-1])["replies"] == 1

        # Whoever reaches the port, with a key that he has made himself and the public certificate.
        make_keys(folder / "stranger", 1)
        refused = "only the server's own machine may"
        key = folder / "stranger" / "node-1.pub"
        told = federation.flwr("supernode", "register", key, CONNECTION, machine="node", code=1)
        assert refused in " ".join(told.replace("│", " ").split())
        told = federation.flwr("run", ".", CONNECTION, machine="node", code=1)
        assert refused in " ".join(told.replace("│", " ").split())
        told = federation.flwr("supernode", "list", CONNECTION, "--format", "json")
        assert told.count('"node-id"') == 1
        assert f"refused '/v1/control/register-node' from {ADDRESS[SITE]}" in federation.log("server")
