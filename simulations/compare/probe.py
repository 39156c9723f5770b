"""A look ahead, before hours are spent: does everything fit, and about how long will it take?"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from simulations.compare.running import PATIENCE, end_processes, start_process
from simulations.config import Config
from vblora.errors import FedVBError, RunError

__all__ = ["Probe", "cores", "look_ahead"]

STEPS = 2  # local steps that are timed
TEXTS = 64  # held-out texts that are timed
SHARE = 0.8  # of the free memory that runs may take together


@dataclass(frozen=True)
class Probe:
    """What was found with the first of the runs.

    Attributes:
        device: "cpu", "cuda:0", ...
        facts: model, data and clients, in words.
        memory: bytes of main memory that a run takes.
        load: seconds until a run trains.
        round: seconds of a round's training.
        evaluation: seconds of scoring all held-out texts.
    """

    device: str
    facts: Mapping[str, str]
    memory: int
    load: float
    round: float
    evaluation: float

    @property
    def at_once(self) -> int:
        """Runs at a time: one a core on a CPU where memory allows, else one."""
        if self.device != "cpu":
            return 1
        return max(1, min(cores(), int(SHARE * _free_memory() // max(1, self.memory))))

    def seconds(self, rounds: int, eval_every: int) -> float:
        """Of one whole run."""
        return self.load + rounds * self.round + (2 + rounds // eval_every) * self.evaluation


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def look_ahead(configs: Sequence[Config], threads: int) -> Probe:
    """Check the configs of the contenders, open the first, see that the others' adapters fit its model, and
    time a few steps; in a process of its own.

    Raises:
        FedVBError: whatever would keep one of them from starting.
    """
    process, connection = start_process(_probe, configs, threads)
    try:
        found: Probe | BaseException = connection.recv()
    except (EOFError, OSError) as error:
        raise RunError("compare: the process that looks ahead died; is there enough memory?") from error
    except KeyboardInterrupt:
        end_processes([process])
        raise
    end_processes([process], PATIENCE)
    if isinstance(found, BaseException):
        raise found
    return found


def _probe(configs: Sequence[Config], threads: int, connection: Connection) -> None:
    try:
        connection.send(_look(configs, threads))
    except FedVBError as error:
        connection.send(error)
    except Exception:
        connection.send(RunError(f"compare: looking ahead failed: {traceback.format_exc(limit=-3)}"))


def _look(configs: Sequence[Config], threads: int) -> Probe:
    started = time.monotonic()
    import torch

    from fl_client.opening import open_site
    from simulations.config import check_config
    from simulations.meters import resident
    from simulations.report import facts
    from vblora.spec import Blueprint
    from vblora.wire import initial

    torch.set_num_threads(threads)
    settings = [check_config(config)[0] for config in configs]
    site = open_site(settings[0])
    blueprint = site.blueprint
    for other in settings[1:]:
        Blueprint(other.adapter.spec(blueprint.linears, 0), blueprint.linears, blueprint.head)
    load = time.monotonic() - started

    state, asked = initial(blueprint), int(configs[0]["clients-per-round"])
    steps, clients = settings[0].local.steps, range(min(asked, 8))
    on_gpu = site.model.device.type == "cuda"
    if on_gpu:  # the first steps choose kernels
        list(site.train_clients(state, dict.fromkeys(clients, 1), round_number=1, scale=1.0))
    started = time.monotonic()
    list(site.train_clients(state, dict.fromkeys(clients, min(STEPS, steps)), round_number=1, scale=1.0))
    training = (time.monotonic() - started) / min(STEPS, steps) * steps * asked / len(clients)

    shards = max(1, len(site.test) // TEXTS)
    started = time.monotonic()
    site.evaluate(state, 0, shards)
    evaluation = (time.monotonic() - started) * shards
    told = facts(site, configs[0])
    shared = {name: told[name] for name in ("model", "data", "clients")}
    return Probe(str(site.model.device), shared, resident(), load, training, evaluation)


def _free_memory() -> float:
    """Bytes of main memory that are to be had; infinitely many where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
