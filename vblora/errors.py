"""Every error that this project raises on purpose.

FedVBError                 anything below; the command line prints it as one line, exit code 2
├── ConfigError            settings that cannot work; lists all faults together
├── DataError              a data set that cannot be read or does not fit the task
├── ModelError             a base model that cannot be loaded or adapted
├── WireError              bytes that do not decode to what they claim to be
│   └── UnknownStateError  they build on a state that is not held here
├── UpdateError            a decoded update that must not be aggregated
├── StartError             an adapter of a file that a run cannot go on from
├── RunError               a run directory, or a round, that cannot go on
└── ExportError            an adapter that the asked format cannot express
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "ExportError",
    "FedVBError",
    "ModelError",
    "RunError",
    "StartError",
    "UnknownStateError",
    "UpdateError",
    "WireError",
    "raise_faults",
]


class FedVBError(Exception):
    """Base of the tree. The message says where, what was found, what was expected, and the fix."""


class ConfigError(FedVBError):
    """Settings that cannot work, alone or together."""


class DataError(FedVBError):
    """A data set that cannot be read, lacks a column, or leaves a client empty."""


class ModelError(FedVBError):
    """A base model that cannot be found, loaded or adapted."""


class WireError(FedVBError):
    """A blob that is truncated, altered, of another version, or out of its declared bounds."""


class UnknownStateError(WireError):
    """A blob that is sound, but builds on a state that the receiver does not hold: ask for a whole one."""


class UpdateError(FedVBError):
    """A well-formed update that must not be aggregated: wrong reference, shape, or a NaN."""


class StartError(FedVBError):
    """An adapter of a file that is missing, damaged, of an unknown kind, or does not fit base or settings."""


class RunError(FedVBError):
    """A run directory that is missing, taken or damaged, or a round that cannot go on."""


class ExportError(FedVBError):
    """An adapter that the requested file format cannot express."""


def raise_faults(where: str, faults: Iterable[str]) -> None:
    """Raise one `ConfigError` that lists every fault, or return if there is none."""
    found = list(faults)
    if found:
        raise ConfigError(f"{where}: " + "; ".join(found))
