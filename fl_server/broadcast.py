"""What goes down: the reference state, to each client as its difference from the last one that it has.

The reference is what its own broadcast decodes to, here as on every client; what rounding drops from the mean
of a round waits here and goes into the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vblora.rounding import Dense, WireSettings, round_state
from vblora.spec import Blueprint
from vblora.state import State
from vblora.wire import decode_state, encode_state, initial

__all__ = ["RECENT", "Broadcast"]

RECENT = 8  # versions that a difference can be taken from, beside version 0; each is a checkpoint too


@dataclass
class Broadcast:
    """The reference of a run and who holds what.

    Attributes:
        blueprint: of all states.
        settings: how the next state is rounded.
        state: the reference.
        waiting: what rounding has dropped so far, by section.
        moments: what the server's steps remember of earlier rounds.
        held: the version that each client is known to hold: it has sent an update against it.
        recent: the last states by version.
    """

    blueprint: Blueprint
    settings: WireSettings
    state: State
    waiting: Dense = field(default_factory=dict)
    moments: Dense = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    recent: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._blobs: dict[int, bytes] = {}
        self.recent[self.state.version] = self.state

    def blob(self, client: str) -> bytes:
        """The state for a client, from version 0, which all can draw, or from what it holds; the shorter."""
        whole, version = self._from(0), self.held.get(client, 0)
        if version == 0 or version not in self.recent:
            return whole
        return min(whole, self._from(version), key=len)

    def acknowledge(self, client: str) -> None:
        """Note that a client holds the reference."""
        self.held[client] = self.state.version

    def forget(self, client: str) -> None:
        """Note that a client has lost what it held."""
        self.held.pop(client, None)

    def advance(self, exact: State) -> None:
        """Take the mean of a round as the next reference, rounded."""
        start = initial(self.blueprint)
        self.state, self.waiting = round_state(exact, self.state, start, self.settings, self.waiting)
        self._blobs.clear()
        self.state = decode_state(self._from(0), self.blueprint)
        self.recent[self.state.version] = self.state
        for version in sorted(self.recent)[:-RECENT]:
            del self.recent[version]
        self.held = {name: version for name, version in self.held.items() if version in self.recent}

    def _from(self, version: int) -> bytes:
        if version not in self._blobs:
            base = initial(self.blueprint) if version == 0 else self.recent[version]
            self._blobs[version] = encode_state(self.state, self.blueprint, base)
        return self._blobs[version]
