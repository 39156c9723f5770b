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

from simulations.compare.running import Layout, start_process
from simulations.config import Config
from simulations.processes import PATIENCE, end_processes
from vblora.errors import FedVBError, RunError

__all__ = ["Probe", "cores", "look_ahead", "share_out"]

STEPS = 2  # local steps that are timed
TEXTS = 64  # held-out texts that are timed
SHARE = 0.8  # of the free memory that runs may take together
HELPER, UNEVEN = 5.0, 1.1  # what it takes to have helpers, in seconds, and times an even share of the work


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

    def seconds(self, rounds: int, eval_every: int) -> float:
        """Of one whole run."""
        return self.load + rounds * self.round + (2 + rounds // eval_every) * self.evaluation


def share_out(probe: Probe, runs: int, config: Config, at_once: int = 0) -> tuple[Layout, float]:
    """How runs share this machine, and about how many seconds they take.

    On a CPU a core trains a run, or all cores train one run after another where that ends sooner: a few runs
    may leave cores idle at the end. A GPU has one run at a time.

    Args:
        probe: what a run takes.
        runs: how many.
        config: of one of them; its `workers` are kept, if there are any.
        at_once: runs at a time, if that was asked for.
    """
    run = probe.seconds(int(config["rounds"]), int(config["eval-every"]))
    workers = int(config["workers"])
    if probe.device != "cpu":
        side = at_once or 1
        return Layout(side, workers, max(1, cores() // side)), -(-runs // side) * run
    processes = max(1, min(cores(), int(SHARE * _free_memory() // max(1, probe.memory))))
    together = min(processes, int(config["clients-per-round"]))
    if at_once or workers:
        workers = workers or max(1, together // at_once)
        at_once = at_once or max(1, processes // workers)
    elif runs * _helped(run, together) < -(-runs // processes) * run:
        at_once, workers = 1, together
    else:
        at_once, workers = processes, 1
    at_once = min(at_once, runs)
    took = run if workers == 1 else _helped(run, workers)
    return Layout(at_once, workers, max(1, cores() // (at_once * workers))), -(-runs // at_once) * took


def _helped(run: float, workers: int) -> float:
    """Seconds of a run that so many processes share."""
    return HELPER + UNEVEN * run / workers


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def look_ahead(configs: Sequence[Config]) -> Probe:
    """Check the configs of the contenders, open the first, see that the others' adapters fit its model, and
    time a few steps on one core; in a process of its own.

    Raises:
        FedVBError: whatever would keep one of them from starting.
    """
    process, connection = start_process(_probe, configs)
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


def _probe(configs: Sequence[Config], connection: Connection) -> None:
    try:
        connection.send(_look(configs))
    except BrokenPipeError:
        raise
    except FedVBError as error:
        connection.send(error)
    except Exception:
        connection.send(RunError(f"compare: looking ahead failed: {traceback.format_exc(limit=-3)}"))


def _look(configs: Sequence[Config]) -> Probe:
    started = time.monotonic()
    import torch

    from fl_client.opening import open_site
    from simulations.config import check_config
    from simulations.meters import resident
    from simulations.report import facts
    from vblora.spec import Blueprint
    from vblora.wire import initial

    torch.set_num_threads(1)
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
