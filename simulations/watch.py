"""Publish a run's rounds while they come: TensorBoard scalars, Prometheus metrics. Both are extras."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_server.events import EVENTS_FILE
from fl_server.history import History
from fl_server.status import read_records
from vblora.errors import ConfigError

__all__ = ["Sink", "prometheus", "tensorboard", "watch"]

Sink = Callable[[int, Mapping[str, float]], None]  # told a round and its numbers

POLL = 2.0  # seconds


def watch(run: Path, sinks: list[Sink], *, follow: bool, poll: float = POLL) -> int:
    """Tell sinks every round of a run, once; with `follow` until the run has its summary, and from where it
    waits for its clients.

    Returns:
        How many rounds were told.

    Raises:
        RunError: there is no run.
    """
    told = 0
    while True:
        finished = (run / "summary.json").is_file()
        waits = follow and (run / EVENTS_FILE).is_file() and not History(run).path.exists()
        for record in [] if waits else read_records(run)[told:]:
            for sink in sinks:
                sink(record["round"], _numbers(record))
            told += 1
        if finished or not follow:
            return told
        time.sleep(poll)


def tensorboard(folder: Path) -> Sink:
    """Scalars of each round, as TensorBoard reads them from `folder`.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    _require("tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def tell(number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, number)
        writer.flush()

    return tell


def prometheus(port: int, host: str = "127.0.0.1") -> Sink:
    """Gauges named `fedvb_...` at http://HOST:PORT/metrics; of the last round each.

    Raises:
        ConfigError: its client library is not installed, or the port is taken.
    """
    _require("prometheus_client", "--prometheus")
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry = CollectorRegistry()
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"--prometheus: port {port} cannot be used ({error}); choose another") from error
    gauges: dict[str, Gauge] = {}

    def tell(number: int, values: Mapping[str, float]) -> None:
        for name, value in {"round": float(number), **values}.items():
            key = "fedvb_" + name.replace("/", "_")
            if key not in gauges:
                gauges[key] = Gauge(key, f"{name} of the last round", registry=registry)
            gauges[key].set(value)

    return tell


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """A record as plain numbers; what a round does not have is left out."""
    traffic = record["bytes"]
    found: dict[str, float | None] = {
        "score": record["score"],
        "own/mean": record["own_mean"],
        "own/std": record["own_std"],
        "loss/train": record["train_loss"],
        "loss/eval": record["eval_loss"],
        "seconds": record["seconds"],
        "clients/asked": record["clients"],
        "clients/replied": record["replies"],
        "clients/rejected": len(record["rejected"]),
        "clients/missing": len(record["missing"]),
        "clients/clipped": len(record["clipped"]),
        "bytes/up": traffic["up"],
        "bytes/down": traffic["down"],
    }
    for section, (middle, largest) in record["norms"].items():
        found |= {f"norm/{section}/median": middle, f"norm/{section}/largest": largest}
    return {name: float(value) for name, value in found.items() if value is not None}


def _require(module: str, option: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option}: needs {module}, which is not installed; pip install 'fed-vblora[monitor]'"
        ) from error
