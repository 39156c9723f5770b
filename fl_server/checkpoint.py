"""Checkpoints of a run: the state after each of its last rounds, one file a round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from vblora.errors import RunError
from vblora.files import load_state, save_state
from vblora.spec import Blueprint
from vblora.state import State

__all__ = ["load_newest", "require_same", "save_checkpoint"]

KEPT = 2  # one more than needed: should the newest turn out unreadable, a single round is lost


def save_checkpoint(out: Path, state: State, blueprint: Blueprint) -> None:
    """Write the checkpoint of round `state.version` atomically, then drop all but the newest."""
    save_state(_folder(out) / f"round-{state.version:05d}.safetensors", state, blueprint)
    for path in _files(out)[KEPT:]:
        path.unlink()
    for path in _folder(out).glob(".round-*"):  # what a killed process left half written
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


def _folder(out: Path) -> Path:
    return out / "checkpoints"


def _files(out: Path) -> list[Path]:
    """Newest first."""
    found = _folder(out).glob("round-*.safetensors")
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)
