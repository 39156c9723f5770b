"""The flat config of a run: what is asked for, handed to both apps, and kept in `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fl_client.hazards import HazardSettings
from fl_client.personal import PersonalSettings
from fl_client.settings import AdapterSettings, ComputeSettings, DataSettings, SiteSettings, from_config
from fl_client.train import LocalSettings
from fl_server.config_file import read_config
from fl_server.settings import ServerSettings
from fl_server.stepping import step_keys
from vblora.errors import ConfigError, raise_faults
from vblora.rounding import wire_keys

__all__ = ["Config", "EngineSettings", "check_config", "default_config", "load_config"]

Config = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class EngineSettings:
    """How the in-process engine runs. Flower's engines have options of their own for this.

    Attributes:
        workers: processes, this one among them; 0 is one a GPU, or one.
    """

    workers: int = 0

    def __post_init__(self) -> None:
        raise_faults("engine", self._faults())

    def _faults(self) -> Iterator[str]:
        if self.workers < 0:
            yield f"workers is {self.workers}, expected 1 or more, or 0 to choose"


def default_config() -> Config:
    """Every key with its default, in the order of the rooms: the settings' own defaults."""
    names = ("model", "device", "dtype", "quantize", "start")
    site = {item.name: item.default for item in fields(SiteSettings) if item.name in names}
    flat: Config = {**site, "cohort": SiteSettings.cohort}  # type: ignore[dict-item]
    for kind in (
        DataSettings,
        AdapterSettings,
        LocalSettings,
        PersonalSettings,
        HazardSettings,
        ComputeSettings,
        ServerSettings,
        EngineSettings,
    ):
        for item in fields(kind):
            if item.name in ("wire", "step"):
                continue
            name = (
                "local-steps"
                if (kind, item.name) == (LocalSettings, "steps")
                else item.name.replace("_", "-")
            )
            flat[name] = item.default  # type: ignore[assignment]
    return {**flat, **step_keys(), **wire_keys()}


def check_config(config: Mapping[str, Any]) -> tuple[SiteSettings, ServerSettings]:
    """Read a flat config into the settings of both sides.

    Raises:
        ConfigError: all faults of all parts, in one line.
    """
    from fl_client.partition import parse_partition  # the data libraries are needed here alone

    faults = []
    parts: list[Any] = []
    checks = (
        SiteSettings.from_run_config,
        ServerSettings.from_run_config,
        lambda given: parse_partition(str(given["partition"])),
        lambda given: from_config(EngineSettings, given),
    )
    for check in checks:
        try:
            parts.append(check(config))
        except ConfigError as error:
            faults.append(str(error))
    if unknown := sorted(set(config) - set(default_config())):
        faults.append(f"unknown keys: {', '.join(unknown)}")
    if faults:
        raise ConfigError("; ".join(dict.fromkeys(faults)))  # both sides read the wire
    return parts[0], parts[1]


def load_config(run: Path) -> Config:
    """Read the config of a run directory; keys that it lacks have their defaults.

    Raises:
        RunError: there is no run, or its config is not readable.
    """
    return {**default_config(), **read_config(run), "out": str(run)}
