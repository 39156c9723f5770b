"""What the sites of a federation have sent, seen on their disks; and the bank that it must have come to."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open

from fl_server.aggregate import aggregate
from fl_server.broadcast import Broadcast
from tests.deploy.federation import Federation
from vblora.files import load_state
from vblora.frame import read_blob
from vblora.rounding import WIRES
from vblora.state import check_update
from vblora.wire import decode_update, initial

__all__ = ["Witness", "read_records"]

POLL = 0.1  # seconds; a round takes some


class Witness:
    """Collects every update that a site leaves on its disk while it is entered. A context manager."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._seen: dict[str, dict[str, list[bytes]]] = {}  # by run and site, in the order they came
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check_bank(self, out: Path) -> None:
        """See that a run's states are those that the updates of its surviving clients give, each once."""
        records = read_records(out)
        last, blueprint = load_state(out / "adapter" / "adapter.safetensors")
        with safe_open(out / "checkpoints" / f"server-{last.version:05d}.safetensors", "np") as file:
            seen = self._seen[file.metadata()["run"]]
        broadcast = Broadcast(blueprint, WIRES["default"], initial(blueprint))
        assert broadcast.state.digest.hex() == records[0]["digest"]
        for record in records[1:]:
            state = broadcast.state
            lost = {fault["client"] for fault in record["rejected"]} | set(record["missing"])
            updates = []
            for name in sorted(set(seen) - lost):
                sent = [
                    decode_update(blob, blueprint, state)
                    for blob in seen[name]
                    if _is_of(blob, state.version)
                ]
                assert len(sent) <= 1, f"{name} has trained round {record['round']} to {len(sent)} results"
                updates += sent  # none where it was away, and not asked
            for update in updates:
                check_update(update, blueprint, state)
            assert len(updates) == record["replies"]
            assert sum(update.examples for update in updates) == record["examples"]
            broadcast.advance(aggregate(state, updates, blueprint))
            assert broadcast.state.digest.hex() == record["digest"], f"round {record['round']}"
        assert broadcast.state.digest == last.digest

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            for site in self._federation.sites:
                for run, blob in site.sent(self._federation.folder).items():
                    sent = self._seen.setdefault(run, {}).setdefault(site.name, [])
                    if blob not in sent:
                        sent.append(blob)


def read_records(out: Path) -> list[dict[str, Any]]:
    """The rounds of a run so far."""
    path = out / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _is_of(blob: bytes, version: int) -> bool:
    """Whether an update was trained from a version."""
    return read_blob(blob)[0].version == version
