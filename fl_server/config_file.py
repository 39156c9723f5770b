"""What a run was asked for, kept as `config.json` in its directory: flat, as Flower's run config is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fl_server.exchange import Scalar
from vblora.errors import ConfigError, RunError
from vblora.files import write_atomic

__all__ = [
    "CHANGEABLE",
    "CONFIG_FILE",
    "ROUNDED",
    "config_differences",
    "read_config",
    "require_same_config",
    "save_config",
]

CONFIG_FILE = "config.json"
HERE = frozenset({"out", "resume"})  # of this call, not of the run: its directory can move

# How clients share processes and forwards, and where: the order of sums, so the last bits of a result.
ROUNDED = frozenset({"cohort", "device", "workers"})
CHANGEABLE = HERE | ROUNDED | {"rounds", "wait-seconds", "timeout-seconds"}  # when a run is resumed


def save_config(out: Path, config: Mapping[str, Scalar]) -> None:
    """Write a config into a run directory, without what is of this call alone."""
    kept = {name: value for name, value in config.items() if name not in HERE}
    write_atomic(out / CONFIG_FILE, json.dumps(kept, indent=2) + "\n")


def read_config(out: Path) -> dict[str, Scalar]:
    """The config of a run directory as it was written.

    Raises:
        RunError: there is no run, or its config is not readable.
    """
    path = out / CONFIG_FILE
    if not path.is_file():
        raise RunError(f"{out}: no run here, expected a directory with {CONFIG_FILE} as a run leaves it")
    try:
        kept: dict[str, Scalar] = json.loads(path.read_text())
        if not isinstance(kept, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: not readable ({error})") from error
    return kept


def require_same_config(out: Path, config: Mapping[str, Scalar]) -> None:
    """See that a run goes on as it was started.

    Raises:
        ConfigError: names every key that differs and would make it another run.
    """
    if not (out / CONFIG_FILE).is_file():  # stopped before it was written
        return
    if differing := list(config_differences(config, read_config(out))):
        raise ConfigError(
            f"resume: {'; '.join(differing)}; give what the run was started with, or start another run"
        )


def config_differences(asked: Mapping[str, Scalar], kept: Mapping[str, Scalar]) -> Iterator[str]:
    """Keys of both that differ and must not, with both values."""
    for name in sorted(asked.keys() & kept.keys() - CHANGEABLE):
        if asked[name] != kept[name]:
            yield f"{name} is {asked[name]!r}, the run has {kept[name]!r}"
