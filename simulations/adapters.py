"""Adapters as `--adapters` names them: KIND or KIND:NUMBER, by comma."""

from __future__ import annotations

from simulations.config import Config
from vblora.adapters import parse_adapter
from vblora.errors import ConfigError, raise_faults

__all__ = ["parse_adapters"]


def parse_adapters(text: str) -> dict[str, Config]:
    """The keys of a config that make each of the named adapters, by its name: `lora:8` sets adapter and rank.

    Raises:
        ConfigError: every name that cannot be read, or comes twice.
    """
    found: dict[str, Config] = {}
    faults = []
    for name in (part.strip().lower() for part in text.split(",")):
        try:
            keys = parse_adapter(name)
        except ConfigError as error:
            faults.append(str(error))
            continue
        if name in found:
            faults.append(f"{name!r} is named twice")
        found[name] = {**keys}
    raise_faults("--adapters", dict.fromkeys(faults))
    return found
