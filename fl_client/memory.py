"""What clients keep between rounds: states that the server may build on, and what rounding dropped.

On disk where a folder is given, so that it outlives the process, and several processes can share it; every
file is written whole or not at all. Of each run apart: its numbers mean nothing to another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from vblora.errors import RunError
from vblora.files import load_state, safetensors_bytes, save_state, write_atomic
from vblora.spec import Blueprint
from vblora.state import State

__all__ = ["Memory"]

STATES = 8  # as many as a server builds on
TURNS = 2  # of what waits: the last round may have to be trained again after a resume
OLDEST = 20  # rounds after which what waits is no longer worth sending: the others have moved on

Dense = Mapping[str, NDArray[np.float32]]


class Memory:
    """The memory of the clients of one process, for one run at a time.

    Args:
        folder: where it lies on disk; None keeps it in this process alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._run = ""
        self._states: dict[bytes, State] = {}
        self._waiting: dict[tuple[int, int], Dense] = {}

    def open(self, run: str) -> None:
        """Turn to a run; what is known of another is left on disk and forgotten here.

        Raises:
            RunError: a name that could leave the folder.
        """
        if not re.fullmatch(r"[0-9a-z]{0,32}", run):
            raise RunError(f"run {run!r:.50}: expected letters a to z and digits, 32 at most")
        if run != self._run:
            self._run, self._states, self._waiting = run, {}, {}

    def state(self, digest: bytes) -> State | None:
        """A state that was kept, by its digest."""
        if digest not in self._states and self._folder is not None:
            for path in self._files(f"states/*-{digest.hex()}.safetensors"):
                try:
                    self._states[digest] = load_state(path)[0]
                except RunError:  # damaged: the server will send it anew
                    path.unlink(missing_ok=True)
        return self._states.get(digest)

    def keep_state(self, state: State, blueprint: Blueprint) -> None:
        """Keep a state that was received, and forget all but the newest."""
        if state.version == 0 or state.digest in self._states:
            return
        self._states[state.digest] = state
        for old in sorted(self._states.values(), key=lambda item: item.version)[:-STATES]:
            del self._states[old.digest]
        if self._folder is None:
            return
        path = self._place() / "states" / f"{state.version:07d}-{state.digest.hex()}.safetensors"
        if not path.exists():
            save_state(path, state, blueprint)
        for old_path in self._files("states/*.safetensors")[:-STATES]:
            old_path.unlink(missing_ok=True)

    def waiting(self, client: int, version: int) -> Dense:
        """What a client's earlier roundings dropped, float32 by section, as of its turns before `version`."""
        turns = [turn for turn in self._turns(client) if version - OLDEST <= turn <= version]
        if not turns:
            return {}
        at = client, max(turns)
        if at not in self._waiting and self._folder is not None:
            try:
                return load(self._file(*at).read_bytes())
            except (OSError, SafetensorError):  # lost: what waited is gone, nothing else
                return {}
        return self._waiting.get(at, {})

    def keep_waiting(self, client: int, version: int, dropped: Dense) -> None:
        """Keep what is left over once a client has trained from the state before `version`."""
        if self._folder is None:
            self._waiting[client, version] = dropped
        else:
            write_atomic(self._file(client, version), safetensors_bytes(dropped, {}))
        for turn in self._turns(client)[:-TURNS]:
            self._waiting.pop((client, turn), None)
            if self._folder is not None:
                self._file(client, turn).unlink(missing_ok=True)

    def keep_sent(self, client: int, blob: bytes) -> None:
        """Keep a client's last update as it leaves, for `fedvb inspect`; on disk only."""
        if self._folder is not None:
            write_atomic(self._place() / "sent" / f"{client}.blob", blob, lasting=False)

    def _turns(self, client: int) -> list[int]:
        """Versions for which something waits, oldest first."""
        if self._folder is None:
            return sorted(turn for name, turn in self._waiting if name == client)
        return sorted(int(path.stem) for path in self._files(f"waiting/{client}/*.safetensors"))

    def _place(self) -> Path:
        assert self._folder is not None
        return self._folder / (self._run or "run")

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self._place().glob(pattern))

    def _file(self, client: int, version: int) -> Path:
        return self._place() / "waiting" / str(client) / f"{version:07d}.safetensors"
