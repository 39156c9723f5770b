"""Train the run that `fedvb bench wire` draws from, and keep rows of what its messages changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fl_client.assembly import assemble, load_texts
from fl_client.base import find_device, load_base
from fl_client.serve import answer
from fl_client.settings import SiteSettings
from fl_server.exchange import Reply, Request
from fl_server.observer import LogObserver
from fl_server.rounds import run_rounds
from fl_server.settings import ServerSettings
from simulations.bench.learning import texts_file
from simulations.direct import DirectExchange
from simulations.replay import PHASES
from vblora.files import write_atomic
from vblora.spec import Blueprint
from vblora.state import State, Update
from vblora.wire import decode_state, decode_update

__all__ = ["record"]

RECORDED_ROWS, RECORDED_VECTORS = 4096, 384


def record(config: dict[str, Any], texts: Path, target: Path) -> None:
    """Train a run, lossless, and keep rows of what its updates and states changed."""
    settings = SiteSettings.from_run_config({**config, "wire": "lossless"})
    prepared = load_texts(texts_file(texts, settings))
    device = find_device(settings.device)
    base = load_base(settings.model, prepared.labels, device, dtype=settings.dtype, seed=settings.data.seed)
    site = assemble(settings, prepared, base)
    server = ServerSettings.from_run_config({**config, "wire": "lossless", "out": f"{target}.run"})
    tap = _Tap(DirectExchange(partial(answer, site), server.clients), site.blueprint, server.rounds)
    run_rounds(tap, server, LogObserver())
    tap.save(target)


class _Tap:
    """An `Exchange` that keeps what passes: updates of the first round and of the last third, states."""

    def __init__(self, inner: DirectExchange, blueprint: Blueprint, rounds: int) -> None:
        self.lasting = inner.lasting
        self._inner, self._blueprint, self._steady = inner, blueprint, 2 * rounds // 3
        self._states: dict[bytes, State] = {}
        self._pairs: dict[str, list[tuple[State, Update]]] = {phase: [] for phase in PHASES}

    def present(self) -> list[str]:
        return self._inner.present()

    def clients(self) -> list[str]:
        return self._inner.clients()

    def ask(self, requests: Sequence[Request], timeout: float) -> Iterator[Reply]:
        for reply in self._inner.ask(requests, timeout):
            if reply.blob:
                state = self._read(requests[0].blob)
                update = decode_update(reply.blob, self._blueprint, state)
                phase = "first" if state.version == 0 else "steady" if state.version >= self._steady else ""
                if phase:
                    self._pairs[phase].append((state, update))
            yield reply

    def _read(self, blob: bytes) -> State:
        state = decode_state(blob, self._blueprint, self._states)
        if state.digest not in self._states:
            for old in self._states.values():
                if old.version == state.version - 1 >= self._steady:
                    dense = {name: state.dense[name] - old.dense[name] for name in state.dense}
                    way = Update(old.version, old.digest, 1, dense, state.topk)
                    self._pairs["down"].append((old, way))
            self._states[state.digest] = state
        return state

    def save(self, target: Path) -> None:
        """Draw rows of all pairs, take the vectors of one, and write them."""
        rng = np.random.default_rng(0)
        arrays: dict[str, Any] = {}
        for phase, pairs in self._pairs.items():
            bases, ways = [old.topk for old, _ in pairs], [way.topk for _, way in pairs]
            columns = {
                "base": np.concatenate([topk.positions for topk in bases if topk]).astype(np.int16),
                "chosen": np.concatenate([topk.positions for topk in ways if topk]).astype(np.int16),
                "base_gaps": np.concatenate([topk.gaps[:, 0] for topk in bases if topk]),
                "gaps": np.concatenate([topk.gaps[:, 0] for topk in ways if topk]),
            }
            at = rng.permutation(len(columns["base"]))[:RECORDED_ROWS]
            # float32 for gaps: a row that did not change is told by its bits
            arrays |= {f"{phase}_{name}": column[at] for name, column in columns.items()}
            # Of one message: vectors of several clients and rounds move more unevenly than those of one.
            middle = pairs[len(pairs) // 2][1].dense
            arrays[f"{phase}_bank"] = middle["bank"][:RECORDED_VECTORS].astype(np.float16)
            arrays[f"{phase}_head"] = middle["head"].astype(np.float16)
        buffer = BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(target, buffer.getvalue())
