"""From a message's arrival at a new ClientApp process to its answer, with a resident trainer and without.

A child process does what `flwr-clientapp` does with a message: import the ClientApp and call it. The clock
starts before the child does; the message asks for one step of training, so what is measured is an upper bound
of the time to the first step.
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
import json, sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fl_client.app import handle
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
node, run = json.loads(sys.argv[1]), json.loads(sys.argv[2])
content = RecordDict({"config": ConfigRecord({"round": 1, "lr-scale": 1.0, "run": "bench"})})
data = open(sys.argv[3], "rb").read()
content["blob"] = ConfigRecord({"blob": data})
(reply,) = handle([Message(content, 2, "train")], [Context(1, 2, node, RecordDict(), run)])
assert reply.has_content(), reply.error
assert reply.content["text"]["steps"] == 1
"""


def run(model: str, data: str, repeats: int = 5) -> dict[str, float]:
    """Measure, print, and return medians in seconds by way: trainer, alone."""
    config = {"local-steps": 1, "model": model, "data": data}
    with tempfile.TemporaryDirectory(prefix="fedvb-") as name:
        folder = Path(name)
        blob = folder / "state"
        blob.write_bytes(_state(model, data))
        nodes = {
            "trainer": {"socket": str(folder / "t.sock"), "name": "bench"},
            "alone": {"data": data, "model": model, "name": "bench"},
        }
        found: dict[str, list[float]] = {way: [] for way in nodes}
        with _trainer(model, data, folder):
            for _ in range(repeats + 1):
                for way, node in nodes.items():
                    started = time.monotonic()
                    command = [sys.executable, "-c", CHILD, json.dumps(node), json.dumps(config), str(blob)]
                    subprocess.run(command, check=True)
                    found[way].append(time.monotonic() - started)
    medians = {way: median(seconds[1:]) for way, seconds in found.items()}  # the first warms the file cache
    table = Table("with", "seconds, median", "least", "most", title="process start to answer, one step")
    for way, seconds in found.items():
        table.add_row(way, *(f"{value:.2f}" for value in (medians[way], min(seconds[1:]), max(seconds[1:]))))
    Console().print(table)
    return medians


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
