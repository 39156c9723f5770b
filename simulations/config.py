"""The flat config of a run: what is asked for, handed to both apps, and kept in `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fl_client.hazards import HazardSettings
from fl_client.partition import parse_partition
from fl_client.settings import AdapterSettings, DataSettings, SiteSettings
from fl_client.train import LocalSettings
from fl_server.settings import ServerSettings
from vblora.errors import ConfigError, RunError
from vblora.files import write_atomic
from vblora.rounding import wire_keys

__all__ = ["CONFIG_FILE", "Config", "check_config", "default_config", "load_config", "save_config"]

Config = dict[str, bool | int | float | str]

CONFIG_FILE = "config.json"


def default_config() -> Config:
    """Every key with its default, in the order of the rooms: the settings' own defaults."""
    site = {
        item.name: item.default for item in fields(SiteSettings) if item.name in ("model", "device", "dtype")
    }
    flat: Config = {**site, "cohort": SiteSettings.cohort}  # type: ignore[dict-item]
    for kind in (DataSettings, AdapterSettings, LocalSettings, HazardSettings, ServerSettings):
        for item in fields(kind):
            if item.name == "wire":
                continue
            name = (
                "local-steps"
                if (kind, item.name) == (LocalSettings, "steps")
                else item.name.replace("_", "-")
            )
            flat[name] = item.default  # type: ignore[assignment]
    return {**flat, **wire_keys()}


def check_config(config: Mapping[str, Any]) -> tuple[SiteSettings, ServerSettings]:
    """Read a flat config into the settings of both sides.

    Raises:
        ConfigError: all faults of all parts, in one line.
    """
    faults = []
    parts: list[Any] = []
    checks = (
        SiteSettings.from_run_config,
        ServerSettings.from_run_config,
        lambda given: parse_partition(str(given["partition"])),
    )
    for check in checks:
        try:
            parts.append(check(config))
        except ConfigError as error:
            faults.append(str(error))
    if unknown := sorted(set(config) - set(default_config())):
        faults.append(f"unknown keys: {', '.join(unknown)}")
    if faults:
        raise ConfigError("; ".join(faults))
    return parts[0], parts[1]


def save_config(out: Path, config: Config) -> None:
    """Write the config into a run directory. Where the run lies is not part of it: the directory can move."""
    kept = {name: value for name, value in config.items() if name not in ("out", "resume")}
    write_atomic(out / CONFIG_FILE, json.dumps(kept, indent=2) + "\n")


def load_config(run: Path) -> Config:
    """Read the config of a run directory.

    Raises:
        RunError: there is no run, or its config is not readable.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise RunError(
            f"{run}: no run here, expected a directory with {CONFIG_FILE} as fedvb simulate writes it"
        )
    try:
        kept: Config = json.loads(path.read_text())
        if not isinstance(kept, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: not readable ({error})") from error
    return {**default_config(), **kept, "out": str(run)}
