"""What messages weigh at the shapes that people use, drawn from a recorded run; what coding takes and gains.

fedvb bench wire
python -m simulations.bench.wire --record --texts DIR      # train the run that is drawn from (SST-2)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
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
from simulations.bench.learning import read_study, texts_file
from simulations.bench.tables import print_table
from simulations.direct import DirectExchange
from simulations.replay import PHASES, replayed_update, write_message
from vblora.entropy import entropy_bits
from vblora.files import write_atomic
from vblora.frame import section_bytes
from vblora.packing import index_bits, pack_integers
from vblora.rounding import WIRES, WireSettings, round_update
from vblora.selection import encode_selection
from vblora.spec import Blueprint, HeadTensor, Linear, LoRASpec, VBLoRASpec
from vblora.state import State, TopK, Update
from vblora.wire import decode_state, decode_update, initial

__all__ = ["SHAPES", "measure", "record", "run", "shape_blueprint"]

RECORDED_ROWS, RECORDED_VECTORS = 4096, 384


def _llama(hidden: int, inner: int, layers: int, key_value: int) -> list[tuple[int, int]]:
    sides = [(hidden, hidden)] * 2 + [(hidden, key_value)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    return sides * layers


# Sides of the adapted layers; r, h, b; rank of the LoRA that it is compared with; size of the head.
SHAPES: dict[str, tuple[list[tuple[int, int]], tuple[int, int, int], int, int]] = {
    "Llama-2-13B": (_llama(5120, 13824, 40, 5120), (6, 2048, 256), 64, 0),
    "Llama-2-7B": (_llama(4096, 11008, 32, 4096), (4, 2048, 256), 64, 0),
    "Llama-3.2-3B": (_llama(3072, 8192, 28, 1024), (4, 256, 256), 32, 0),
    "RoBERTa-large q,v": ([(1024, 1024)] * 48, (4, 90, 256), 8, 0),
    "MiniLM": ([(384, 384)] * 24 + [(384, 1536), (1536, 384)] * 6 + [(384, 384)], (4, 256, 128), 8, 770),
}


def shape_blueprint(name: str, lora: bool = False) -> Blueprint:
    """The adapter of a shape, VB-LoRA or the LoRA beside it."""
    sides, (rank, h, b), lora_rank, head = SHAPES[name]
    linears = tuple(Linear(f"{number}", *pair) for number, pair in enumerate(sides))
    spec = VBLoRASpec(rank=rank, num_vectors=h, vector_length=b)
    heads = (HeadTensor("head", (head,)),) if head else ()
    return Blueprint(LoRASpec(rank=lora_rank) if lora else spec, linears, heads)


def measure(name: str, wire: WireSettings) -> dict[str, Any]:
    """Bytes of one shape through one wire, by phase and section, with seconds of both directions."""
    blueprint = shape_blueprint(name)
    found: dict[str, Any] = {"shape": name, "rows": blueprint.rows, "lora_float32": _lora_bytes(name)}
    for phase in PHASES:
        reference, exact = replayed_update(blueprint, phase)
        started = time.perf_counter()
        blob = write_message(blueprint, phase, reference, exact, wire)
        if phase == "down":
            decode_state(blob, blueprint, {reference.digest: reference})
        else:
            decode_update(blob, blueprint, reference)
        seconds = time.perf_counter() - started
        sections = section_bytes(blob)
        head = sections.pop("head", 0)
        found[phase] = {
            "bytes": len(blob) - head,
            "head": head,
            "sections": sections,
            "seconds": seconds,
            "bank_entropy_bytes": 0.0 if phase == "down" else _entropy(exact, reference, wire),
        }
    return found


def measure_selections(name: str) -> dict[str, Any]:
    """Bytes of the sets of one shape's first and steady updates, and of sets drawn evenly, by coder."""
    blueprint = shape_blueprint(name)
    assert blueprint.topk_shape is not None
    rows, k, h = blueprint.topk_shape
    limit = rows * math.log2(math.comb(h, k)) / 8
    found: dict[str, Any] = {"shape": name, "limit": limit}
    rng = np.random.default_rng(0)
    even = initial(blueprint)
    assert even.topk is not None
    first = rng.integers(h, size=rows)
    drawn = np.stack([first, (first + rng.integers(1, h, size=rows)) % h], axis=1).astype(np.int32)
    cases = {"even": (even.topk, TopK(drawn, np.zeros_like(even.topk.gaps)))}
    for phase in ("first", "steady"):
        reference, update = replayed_update(blueprint, phase)
        assert reference.topk is not None
        assert update.topk is not None
        cases[phase] = reference.topk, update.topk
    for case, (base, topk) in cases.items():
        packed = pack_integers(topk.positions, index_bits(h))
        kept = (topk.positions == base.positions).all(axis=1, keepdims=True)
        bare = TopK(topk.positions, np.where(kept, base.gaps, np.float32(0)))  # sets without weights
        found[case] = {
            "packed": len(packed),
            "zstd": _zstd(packed),
            "zlib": len(zlib.compress(packed, 9)),
            "ours": len(encode_selection(bare, base)),
            "kept": float(kept.mean()),
        }
    return found


def run(target: Path | None) -> None:
    """Measure all shapes and print tables; `target` gets everything as JSON."""
    wires = {preset: [measure(name, wire) for name in SHAPES] for preset, wire in WIRES.items()}
    sets = [measure_selections(name) for name in SHAPES]
    columns: dict[str, Callable[[Any], str]] = {
        "shape": lambda row: row["shape"],
        "rows": lambda row: f"{row['rows']:,}",
        "first": lambda row: _kb(row["first"]["bytes"]),
        "steady": lambda row: _kb(row["steady"]["bytes"]),
        "down": lambda row: _kb(row["down"]["bytes"]),
        "head": lambda row: _kb(row["steady"]["head"]),
        "bank": lambda row: _kb(row["steady"]["sections"].get("bank", 0)),
        "× LoRA": lambda row: f"{row['lora_float32'] / row['steady']['bytes']:,.0f}",
        "s": lambda row: f"{row['steady']['seconds']:.2f}",
    }
    for preset, found in wires.items():
        print_table(f"--wire {preset}: kB a message", found, columns)
    print("first, steady: an update of round 1, of the last third; down: from the last state to the next.")
    print("head and bank: of steady; the other columns leave the head out. × LoRA: float32 LoRA over steady.")
    print("s: seconds of rounding, writing and reading a steady update.\n")
    flat = [
        {"shape": row["shape"], "case": case, "limit": row["limit"], **row[case]}
        for row in sets
        for case in ("first", "steady", "even")
    ]
    print_table(
        "Sets of the rows: kB by coder",
        flat,
        {
            "shape": lambda row: row["shape"],
            "sets": lambda row: row["case"],
            "kept": lambda row: f"{row['kept']:.0%}",
            "limit": lambda row: _kb(row["limit"]),
            **{coder: partial(_coder, coder) for coder in ("packed", "zlib", "zstd", "ours")},
        },
    )
    print("kept: rows that keep their set; limit: log2 C(h, k) bits a row, order apart (one bit more).")
    if target is not None:
        write_atomic(target, json.dumps({"wires": wires, "sets": sets}, indent=1) + "\n")


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
        """Draw rows of all pairs and write them."""
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
            at = rng.choice(len(columns["base"]), RECORDED_ROWS, replace=False)
            # float32 for gaps: a row that did not change is told by its bits
            arrays |= {f"{phase}_{name}": column[at] for name, column in columns.items()}
            bank = np.concatenate([way.dense["bank"] for _, way in pairs])
            at = rng.choice(len(bank), RECORDED_VECTORS, replace=False)
            arrays[f"{phase}_bank"] = bank[at].astype(np.float16)
            head = np.concatenate([way.dense["head"] for _, way in pairs])
            arrays[f"{phase}_head"] = rng.choice(head, 2048, replace=False).astype(np.float16)
        buffer = BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(target, buffer.getvalue())


def _entropy(exact: Update, reference: State, wire: WireSettings) -> float:
    """Bytes that the bank's steps take at least; 0 where it is not on steps."""
    update, _ = round_update(exact, reference, wire, {}, np.random.default_rng(0))
    step = update.steps.get("bank", 0.0)
    return entropy_bits(np.rint(update.dense["bank"] / step).astype(np.int64)) / 8 if step else 0.0


def _lora_bytes(name: str) -> int:
    blueprint = shape_blueprint(name, lora=True)
    return 4 * math.prod(blueprint.dense_shapes["rows"])


def _zstd(content: bytes) -> int:
    """Bytes after zstd at its highest level, by pyarrow, which comes with datasets."""
    try:
        import pyarrow
    except ImportError:
        return 0
    return len(pyarrow.Codec("zstd", compression_level=22).compress(content, asbytes=True))


def _coder(coder: str, row: dict[str, Any]) -> str:
    return _kb(row[coder]) if row[coder] else "-"


def _kb(count: float) -> str:
    return f"{count / 1000:,.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, or record the run that is drawn from."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--study", type=Path, default=Path(__file__).parent / "studies" / "sst2.json")
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="prepared by bench.learning")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recorded.npz")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if given.record:
        record({**read_study(given.study)[0], "model": given.model}, given.texts, given.out)
    else:
        run(given.json)


if __name__ == "__main__":
    main(sys.argv[1:])
