"""Run virtual clients in this process: Flower's two apps, our grid, and the files of a run directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fl_client.app import handle
from fl_client.opening import open_site
from fl_client.site import OnStep, Site
from fl_client.text_scores import require_libraries
from fl_server.app import app as server_app
from fl_server.config_file import CHANGEABLE, ROUNDED, config_differences
from fl_server.history import History
from fl_server.observer import Observer
from simulations.config import Config, check_config, load_config
from simulations.grid import InProcessGrid, run_server_app
from simulations.workers import Workers, count_workers
from vblora.errors import ConfigError, RunError

__all__ = ["free_run_directory", "prepare", "require_writable", "resume_note", "resumed_config", "simulate"]


def prepare(config: Config) -> Site:
    """Check the config, see that the run directory is free (or holds the run to resume), and load data and
    model.

    Raises:
        FedVBError: anything that would keep the run from starting; nothing is written before.
    """
    settings, server = check_config(config)
    if server.eval_generate:
        require_libraries()
    require_writable(Path(server.out))
    History(Path(server.out)).check(server.resume)
    return open_site(replace(settings, state=str(Path(server.out) / "clients")))


def simulate(
    config: Config, observer: Observer | None = None, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Train, and leave a finished run directory: config, history, checkpoints, adapter, plot, summary.

    Args:
        config: as `default_config`, with `out`.
        observer: told what happens in the rounds; None lets the server log.
        on_step: told the local steps in this process.

    Returns:
        The content of `summary.json`.

    Raises:
        FedVBError: the run cannot start or go on; what is on disk can be resumed.
        KeyboardInterrupt: after the last finished round is on disk.
    """
    site = prepare(config)
    out = Path(str(config["out"]))
    with Workers(site, count_workers(int(config["workers"]), site.model.device)) as pool:
        handle_all = partial(handle, answers=partial(pool.answer, on_step=on_step))
        grid = InProcessGrid(handle_all, int(config["clients"]), config, observer)
        run_server_app(server_app, grid, config)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def resumed_config(out: Path, given: Mapping[str, Any]) -> Config:
    """The config to go on with: the run's own, and what may change.

    Args:
        out: the run directory.
        given: keys that were asked for now.

    Raises:
        ConfigError: a key differs that would make it another run.
    """
    kept = load_config(out)
    if differing := list(config_differences(given, kept)):
        raise ConfigError(f"--resume: {'; '.join(differing)}; leave them out, or start another run")
    if (rounds := given.get("rounds", kept["rounds"])) < (done := _rounds_done(out)):
        raise ConfigError(
            f"--resume: rounds is {rounds}, the run has finished round {done}; ask for that or more"
        )
    return {
        **kept,
        **{name: given[name] for name in CHANGEABLE & set(given)},
        "out": str(out),
        "resume": True,
    }


def resume_note(config: Config) -> str:
    """One line where a run is resumed in a way that changes its last bits, else nothing."""
    kept = load_config(Path(str(config["out"])))
    changed = [
        f"{name} is {config[name]}, the run had {kept[name]}"
        for name in sorted(ROUNDED)
        if config[name] != kept[name]
    ]
    return f"{'; '.join(changed)}: it goes on equal up to rounding, not bit for bit" if changed else ""


def free_run_directory(root: Path, config: Config) -> Path:
    """A directory below `root` named after what is run, with a number where that name is taken."""
    stem = "-".join(
        [
            Path(str(config["model"])).name,
            Path(str(config["data"])).name,
            str(config["adapter"]),
            f"seed{config['seed']}",
        ]
    )
    names = (root / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 1_000_000))
    return next(path for path in names if not path.exists())


def _rounds_done(out: Path) -> int:
    history = History(out).path
    return max(0, history.read_bytes().count(b"\n") - 1) if history.is_file() else 0


def require_writable(out: Path) -> None:
    """See that a run directory can be made, before minutes are spent on reading the data."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"--out: {there} is a file, expected a directory that can be made or is a run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"--out: {there} cannot be written to; choose another --out")
