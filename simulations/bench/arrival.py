"""From a message's arrival at a new ClientApp process to its answer, with a resident trainer and without.

A child process does what `flwr-clientapp` does: once it has the message it imports the ClientApp and calls
it. The message asks for one step of training, so what is measured is an upper bound of the time to the first
step: from the message's arrival, and from the start of the process, Python's and Flower's imports included.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from fl_client.thin import trainer_listens, trainer_status
from vblora.errors import RunError

__all__ = ["run"]

CHILD = """
import json, sys, time
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
arrived = time.monotonic()
from fl_client.app import handle
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
node, run = json.loads(sys.argv[1]), json.loads(sys.argv[2])
content = RecordDict({"config": ConfigRecord({"round": 1, "lr-scale": 1.0, "run": "bench"})})
data = open(sys.argv[3], "rb").read()
content["blob"] = ConfigRecord({"blob": data})
(reply,) = handle([Message(content, 2, "train")], [Context(1, 2, node, RecordDict(), run)])
assert reply.has_content(), reply.error
assert reply.content["text"]["steps"] == 1
print(time.monotonic() - arrived)
"""


def run(model: str, data: str, repeats: int = 5) -> dict[str, list[float]]:
    """Measure, print, and return seconds from arrival to answer by way: trainer, alone."""
    config = {"local-steps": 1, "model": model, "data": data}
    with tempfile.TemporaryDirectory(prefix="fedvb-") as name:
        folder = Path(name)
        blob = folder / "state"
        blob.write_bytes(_state(model, data))
        nodes = {
            "trainer": {"socket": str(folder / "t.sock"), "name": "bench"},
            "alone": {"data": data, "model": model, "name": "bench"},
        }
        arrived: dict[str, list[float]] = {way: [] for way in nodes}
        started: dict[str, list[float]] = {way: [] for way in nodes}
        with _trainer(model, data, folder):
            for turn in range(repeats + 1):
                for way, node in nodes.items():
                    before = time.monotonic()
                    command = [sys.executable, "-c", CHILD, json.dumps(node), json.dumps(config), str(blob)]
                    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    if turn:  # the first warms the file cache
                        started[way].append(time.monotonic() - before)
                        arrived[way].append(float(told.splitlines()[-1]))
    table = Table("with", "from", "seconds, median", "least", "most", title="to the answer, one step")
    for name, found in (("arrival", arrived), ("process start", started)):
        for way, seconds in found.items():
            shown = (f"{value:.2f}" for value in (median(seconds), min(seconds), max(seconds)))
            table.add_row(way, name, *shown)
    Console().print(table)
    return arrived


def _state(model: str, data: str) -> bytes:
    """The initial state of the adapter that these make."""
    from fl_client.opening import open_site
    from fl_client.settings import SiteSettings
    from vblora.wire import encode_state, initial

    own = {"model": model, "data": data, "clients": 1, "partition": "iid", "local-steps": 1}
    blueprint = open_site(SiteSettings.from_run_config(own)).blueprint
    return encode_state(initial(blueprint), blueprint, initial(blueprint))


@contextmanager
def _trainer(model: str, data: str, folder: Path) -> Iterator[None]:
    socket = folder / "t.sock"
    command = [sys.executable, "-m", "simulations.cli", "trainer", "--model", model, "--data", data]
    command += ["--state", str(folder / "state-of-trainer"), "--socket", str(socket)]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    try:
        while not (trainer_listens(socket) and not trainer_status(socket).busy):
            if process.poll() is not None:
                raise RunError(f"bench: the trainer ended with {process.returncode}; try it by itself")
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
