"""Adapters as `--adapters` names them: KIND or KIND:NUMBER, by comma."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from simulations.config import Config
from vblora.errors import raise_faults
from vblora.spec import ADAPTERS

__all__ = ["parse_adapters"]

NUMBERS: Mapping[str, str] = dict.fromkeys(ADAPTERS, "rank")  # the key that KIND's number is


def parse_adapters(text: str) -> dict[str, Config]:
    """The keys of a config that make each of the named adapters, by its name: `lora:8` sets adapter and rank.

    Raises:
        ConfigError: every name that cannot be read, or comes twice.
    """
    names = [part.strip().lower() for part in text.split(",")]
    raise_faults("--adapters", _faults(text, names))
    return {name: _keys(name) for name in names}


def _keys(name: str) -> Config:
    kind, _, number = name.partition(":")
    return {"adapter": kind, **({NUMBERS[kind]: int(number)} if number else {})}


def _faults(text: str, names: list[str]) -> Iterator[str]:
    if not text.strip():
        yield f"nothing named; expected names by comma, such as vblora,lora:8 ({', '.join(ADAPTERS)})"
        return
    for name in dict.fromkeys(names):
        kind, colon, number = name.partition(":")
        if kind not in ADAPTERS:
            yield f"{name!r} is unknown, expected KIND or KIND:NUMBER, KIND of {', '.join(ADAPTERS)}"
        elif colon and not (number.isascii() and number.isdigit() and int(number) > 0):
            yield f"{name!r}: {number!r} is no {NUMBERS[kind]}, expected a whole number of 1 or more"
        if names.count(name) > 1:
            yield f"{name!r} is named twice"
