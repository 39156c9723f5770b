"""What clients keep between rounds: states that the server may build on, what rounding dropped, and what is
theirs alone.

On disk where a folder is given, so that it outlives the process, and several processes can share it; every
file that a client reads again is written whole or not at all. Of each run apart: its numbers mean nothing to
another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from fl_client.personal import Part
from vblora.errors import RunError
from vblora.files import load_state, safetensors_bytes, save_state, write_atomic
from vblora.spec import Blueprint
from vblora.state import State

__all__ = ["Memory"]

STATES = 8  # as many as a server builds on
TURNS = 2  # kept of a client: the last round may have to be trained again after a resume
OLDEST = 20  # rounds after which what waits is no longer worth sending: the others have moved on

Dense = Mapping[str, NDArray[np.float32]]
What = Literal["waiting", "personal"]


class Memory:
    """The memory of the clients of one process, for one run at a time.

    Args:
        folder: where it lies on disk; None keeps it in this process alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._run = ""
        self._states: dict[bytes, State] = {}
        self._kept: dict[tuple[What, int, int], Mapping[str, NDArray[Any]]] = {}

    def open(self, run: str) -> None:
        """Turn to a run; what is known of another is left on disk and forgotten here.

        Raises:
            RunError: a name that could leave the folder.
        """
        if not re.fullmatch(r"[0-9a-z]{0,32}", run):
            raise RunError(f"run {run!r:.50}: expected letters a to z and digits, 32 at most")
        if run != self._run:
            self._run, self._states, self._kept = run, {}, {}

    def state(self, digest: bytes) -> State | None:
        """A state that was kept, by its digest."""
        if digest not in self._states and self._folder is not None:
            for path in self._files(f"states/*-{digest.hex()}.safetensors"):
                try:
                    found = load_state(path)[0]
                except RunError:
                    found = None
                if found is None or found.digest != digest:  # damaged: the server will send it anew
                    path.unlink(missing_ok=True)
                else:
                    self._states[digest] = found
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
        turn = self._last_turn("waiting", client, version)
        if turn is None or turn < version - OLDEST:
            return {}
        try:
            return self._read("waiting", client, turn)
        except (OSError, SafetensorError):  # lost: what waited is gone, nothing else
            return {}

    def keep_waiting(self, client: int, version: int, dropped: Dense) -> None:
        """Keep what is left over once a client has trained from the state before `version`."""
        self._keep("waiting", client, version, dropped)

    def personal(self, client: int, version: int) -> Part | None:
        """A client's own part as of its turns before `version`; None where it has had none.

        Raises:
            RunError: it is damaged, or no longer kept. To go on without it would undo all that the client has
                learned.
        """
        turn = self._last_turn("personal", client, version)
        if turn is None:
            turns = self._turns("personal", client)
            if len(turns) < TURNS:  # none was dropped: a first turn is taken again, if any
                return None
            where = f"client {client}" if self._folder is None else self._file("personal", client, 0).parent
            raise RunError(
                f"{where}: a client's personal parts are of versions {', '.join(map(str, turns))}, the run "
                f"has gone back to {version}; resume it from a newer checkpoint, or delete the parts to go "
                "on from the shared state"
            )
        try:
            return Part.of(self._read("personal", client, turn))
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(
                f"{self._file('personal', client, turn)}: a client's personal part cannot be read ({error}); "
                "delete the file to go on from its turn before, or from the shared state"
            ) from error

    def keep_personal(self, client: int, version: int, part: Part) -> None:
        """Keep a client's own part once it has trained from the state before `version`."""
        self._keep("personal", client, version, part.arrays())

    def keep_sent(self, client: int, blob: bytes) -> None:
        """Keep a client's last update as it leaves, for `fedvb inspect`; on disk only.

        Over the one before: a new file in its place would take as long as all coding. Should the process die
        meanwhile, the blob's checksum tells.
        """
        if self._folder is not None:
            folder = self._place() / "sent"
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(folder / f"{client}.blob", os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
                file.write(blob)
                file.truncate()

    def _last_turn(self, what: What, client: int, version: int) -> int | None:
        return max((turn for turn in self._turns(what, client) if turn <= version), default=None)

    def _turns(self, what: What, client: int) -> list[int]:
        """Versions for which something is kept, oldest first."""
        if self._folder is None:
            return sorted(turn for kind, name, turn in self._kept if (kind, name) == (what, client))
        return sorted(int(path.stem) for path in self._files(f"{what}/{client}/*.safetensors"))

    def _read(self, what: What, client: int, turn: int) -> Mapping[str, NDArray[Any]]:
        if self._folder is None:
            return self._kept[what, client, turn]
        return load(self._file(what, client, turn).read_bytes())

    def _keep(self, what: What, client: int, version: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        if self._folder is None:
            self._kept[what, client, version] = arrays
        else:
            write_atomic(self._file(what, client, version), safetensors_bytes(arrays, {}))
        for turn in self._turns(what, client)[:-TURNS]:
            self._kept.pop((what, client, turn), None)
            if self._folder is not None:
                self._file(what, client, turn).unlink(missing_ok=True)

    def _place(self) -> Path:
        assert self._folder is not None
        return self._folder / (self._run or "run")

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self._place().glob(pattern))

    def _file(self, what: What, client: int, version: int) -> Path:
        return self._place() / what / str(client) / f"{version:07d}.safetensors"
