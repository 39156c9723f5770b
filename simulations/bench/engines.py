"""One round of MiniLM on a CPU: our engine against Flower's simulation engine with Ray, same apps, same run.

Each run has a process of its own. Start-up is left out: seconds are those of the history, of rounds 2 and
later. Ray runs inside `flwr.simulation.run_simulation`, which drives the engine that `flwr run .` drives,
without the SuperLink beside it.
"""

from __future__ import annotations

import csv
import logging
import os
import random
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fl_server.plot import read_history

__all__ = ["ENGINES", "Engine", "measure_engines"]

Config = dict[str, Any]

WORDS = ["time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "place"]
LENGTH = 32
STEPS, ROWS = 2, 8


@dataclass(frozen=True)
class Engine:
    """A way to run virtual clients: `workers` processes or actors, which share the cores evenly."""

    name: str
    workers: int

    def __str__(self) -> str:
        return f"{self.name}, {self.workers} × {_threads(self.workers)} threads"


ENGINES = (Engine("ray", 2), Engine("ours", 1), Engine("ours", 2))


def measure_engines(repeats: int, clients: int, rounds: int, model: str = "minilm") -> dict[str, Any]:
    """Run all engines in turn, `repeats` times over. Returns notes and rows for JSON."""
    seconds: dict[Engine, list[list[float]]] = {engine: [] for engine in ENGINES}
    losses: dict[Engine, float] = {}
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.csv"
        _write_texts(data, clients * STEPS * ROWS)
        for repeat in range(repeats):
            for engine in list(seconds):
                config = _config(engine, model, data, clients, rounds, Path(folder) / f"{repeat}-{engine}")
                try:
                    records = apart(run_engine, engine, config)
                except ImportError as error:
                    notes.append(f"{engine}: left out ({error})")
                    del seconds[engine]
                    continue
                seconds[engine].append([record["seconds"] for record in records[2:]])
                losses[engine] = records[-1]["train_loss"]
    rows = list(_rows(seconds, losses))
    return {"clients": clients, "steps": STEPS, "batch": [ROWS, LENGTH], "notes": notes, "rows": rows}


def apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own, which may have children."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_engine(engine: Engine, config: Config) -> list[dict[str, Any]]:
    """The history of a run."""
    warnings.simplefilter("ignore")
    for name in ("FLWR_TELEMETRY_ENABLED", "TOKENIZERS_PARALLELISM"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if engine.name == "ray":
        _run_ray(engine, config)
    else:
        _run_ours(engine, config)
    return read_history(Path(config["out"]))


def _run_ours(engine: Engine, config: Config) -> None:
    import torch

    from fl_server.observer import LogObserver
    from simulations.simulate import simulate

    torch.set_num_threads(_threads(engine.workers))
    simulate(config | {"workers": engine.workers}, LogObserver())


def _run_ray(engine: Engine, config: Config) -> None:
    """The two apps as they are, but for the run config: `run_simulation` takes none."""
    os.environ.pop(
        "OMP_NUM_THREADS", None
    )  # Ray gives actors their share of threads only where this is unset
    import ray  # noqa: F401 (an ImportError here says what is missing)
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from fl_server.app import app as their_server_app

    server_app, client_app = ServerApp(), ClientApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        their_server_app(grid, _with_config(context, config))

    def answer(message: Message, context: Context) -> Message:
        from fl_client.app import app as their_client_app

        return their_client_app(message, _with_config(context, config))

    for register in (
        *(client_app.train(), client_app.evaluate()),
        *(client_app.query("hello"), client_app.query("describe")),
    ):
        register(answer)
    resources = {"num_cpus": 1, "num_gpus": 0.0}  # of an actor: Ray gives it one thread
    backend: Any = {"client_resources": resources, "init_args": {"num_cpus": engine.workers}}
    run_simulation(server_app, client_app, config["clients"], backend_config=backend)


def _with_config(context: Any, config: Config) -> Any:
    return type(context)(context.run_id, context.node_id, context.node_config, context.state, config)


def _config(engine: Engine, model: str, data: Path, clients: int, rounds: int, out: Path) -> Config:
    from simulations.config import default_config

    return {
        **default_config(),
        "model": model,
        "data": str(data),
        "partition": "iid",
        "clients": clients,
        "clients-per-round": clients,
        "rounds": rounds,
        "eval-every": rounds + 1,  # the last round is evaluated all the same, and left out
        "eval-examples": ROWS,
        "max-length": LENGTH,
        "local-steps": STEPS,
        "batch-size": ROWS,
        "device": "cpu",
        "out": str(out),
    }


def _rows(
    seconds: Mapping[Engine, list[list[float]]], losses: Mapping[Engine, float]
) -> Iterator[dict[str, Any]]:
    """Medians; ratios to Ray within each repetition."""
    means = {
        engine: [statistics.mean(rounds[:-1] or rounds) for rounds in runs]
        for engine, runs in seconds.items()
    }
    rays = next((runs for engine, runs in means.items() if engine.name == "ray"), None)
    for engine, found in means.items():
        ratios = [ours / ray for ours, ray in zip(found, rays, strict=True)] if rays else []
        yield {
            "engine": str(engine),
            "seconds": statistics.median(found),
            "to_ray": statistics.median(ratios) if ratios else None,
            "train_loss": losses[engine],
            "rounds": seconds[engine],
        }


def _write_texts(path: Path, count: int) -> None:
    """Texts that are all cut at one length."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count * 5 // 4):  # some are held out
            writer.writerow([" ".join(draw.choices(WORDS, k=LENGTH + 8)), draw.choice("abcde")])


def _threads(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)
