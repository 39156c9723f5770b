"""Checkpoints of a run: the state after each of its last rounds, and what the server alone knows beside it.

A round has two files. The server's is written first, so a state on disk has all that a run goes on from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fl_server.broadcast import RECENT, Broadcast
from vblora.errors import RunError
from vblora.files import load_state, safetensors_bytes, save_state, write_atomic
from vblora.spec import Blueprint
from vblora.state import State

__all__ = ["load_newest", "require_same", "restore", "run_name", "save_checkpoint"]

Floats = NDArray[np.float32]


def save_checkpoint(out: Path, run: str, broadcast: Broadcast) -> None:
    """Write the checkpoint of a round atomically, then drop all that no client's state can build on.

    Args:
        out: run directory.
        run: name of the run, by which clients keep what they remember.
        broadcast: the reference after the round, and who holds what.
    """
    state, folder = broadcast.state, _folder(out)
    tensors = {f"waiting/{name}": array for name, array in broadcast.waiting.items()}
    tensors |= {f"moments/{name}": array for name, array in broadcast.moments.items()}
    beside = safetensors_bytes(tensors, {"run": run, "held": json.dumps(broadcast.held)})
    write_atomic(folder / f"server-{state.version:05d}.safetensors", beside)
    save_state(folder / f"round-{state.version:05d}.safetensors", state, broadcast.blueprint)
    for path in _files(out)[RECENT:]:
        path.unlink()
        _server_file(path).unlink(missing_ok=True)
    for path in _folder(out).glob(".*"):  # what a killed process left half written
        path.unlink()


def load_newest(out: Path) -> tuple[State, Blueprint] | None:
    """The newest checkpoint that can be read, or None where the run was cut off before its first.

    Raises:
        RunError: there are checkpoints, but none is readable.
    """
    faults = []
    for path in _files(out):
        try:
            return load_state(path)
        except RunError as error:
            faults.append(str(error))
    if faults:
        raise RunError(f"{out}: no readable checkpoint: " + "; ".join(faults))
    return None


def restore(out: Path, state: State, broadcast: Broadcast) -> str:
    """Fill in what the server knew after round `state.version`; gives the name of the run.

    Without it a run goes on too: clients get states from version 0, and what rounding dropped is gone.
    """
    for path in _files(out):
        try:
            older = load_state(path)[0]
        except RunError:
            continue
        if older.version <= state.version:
            broadcast.recent[older.version] = older
    path = _server_file(_folder(out) / f"round-{state.version:05d}.safetensors")
    try:
        with safe_open(path, "np") as file:
            known = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        broadcast.waiting = _below("waiting/", tensors)
        broadcast.moments = _below("moments/", tensors)
        broadcast.held = {str(name): int(version) for name, version in json.loads(known["held"]).items()}
        return str(known["run"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return ""


def run_name(out: Path, version: int) -> str:
    """The name by which the clients of a run keep what they remember.

    Raises:
        RunError: the checkpoint of that version lacks it.
    """
    path = _server_file(_folder(out) / f"round-{version:05d}.safetensors")
    try:
        with safe_open(path, "np") as file:
            return str((file.metadata() or {})["run"])
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(f"{path}: cannot be read ({error}); it tells where the clients' parts are") from error


def require_same(found: Blueprint, expected: Blueprint, out: Path) -> None:
    """See that a run goes on with the adapter that it was started with.

    Raises:
        RunError: names every setting that differs.
    """
    differences = list(_differences(json.loads(found.to_json()), json.loads(expected.to_json())))
    if differences:
        raise RunError(
            f"{out}: its checkpoint is of another adapter than the clients hold: " + "; ".join(differences)
        )


def _differences(checkpoint: dict[str, object], clients: dict[str, object]) -> Iterator[str]:
    for key in sorted(checkpoint.keys() | clients.keys()):
        old, new = checkpoint.get(key), clients.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif isinstance(old, list) and isinstance(new, list) and len(old) != len(new):
            yield f"{key}: the checkpoint has {len(old)}, the clients {len(new)}"
        elif old != new:
            yield f"{key}: the checkpoint has {old!r:.60}, the clients {new!r:.60}"


def _below(prefix: str, tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _folder(out: Path) -> Path:
    return out / "checkpoints"


def _server_file(path: Path) -> Path:
    return path.with_name(path.name.replace("round-", "server-"))


def _files(out: Path) -> list[Path]:
    """Newest first."""
    found = _folder(out).glob("round-*.safetensors")
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)
