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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simulations.bench.learning import read_study
from simulations.bench.recorder import record
from simulations.bench.sets import measure_churn, measure_sets
from simulations.bench.tables import print_table
from simulations.replay import PHASES, replayed_update, write_message
from vblora.entropy import entropy_bits
from vblora.errors import FedVBError
from vblora.files import write_atomic
from vblora.frame import section_bytes
from vblora.lanes import lane_entropy
from vblora.rounding import WIRES, WireSettings
from vblora.selection import selection_streams
from vblora.spec import Blueprint, HeadTensor, Linear, LoRASpec, VBLoRASpec
from vblora.state import State, Update
from vblora.wire import decode_state, decode_update

__all__ = ["SHAPES", "TARGETS", "entropies", "measure", "run", "shape_blueprint"]


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
# kB of a first and a steady update and of a state, without the head, that the default wire must keep to.
TARGETS: Mapping[str, tuple[float, float, float]] = {
    "Llama-2-13B": (550, 300, 600),
    "Llama-2-7B": (360, 240, 420),
    "Llama-3.2-3B": (90, 37, 100),
    "RoBERTa-large q,v": (13, 10, 16),
}
NOTES = (
    "first, steady: an update of round 1, of the last third; down: from the last state to the next.",
    "head and bank: of steady; the other columns leave the head out. × LoRA: float32 LoRA over steady.",
    "s: CPU seconds of rounding, writing and reading a steady update.",
)


def shape_blueprint(name: str, lora: bool = False) -> Blueprint:
    """The adapter of a shape, VB-LoRA or the LoRA beside it."""
    sides, (rank, h, b), lora_rank, head = SHAPES[name]
    linears = tuple(Linear(f"{number}", *pair) for number, pair in enumerate(sides))
    spec = VBLoRASpec(rank=rank, num_vectors=h, vector_length=b)
    heads = (HeadTensor("head", (head,)),) if head else ()
    return Blueprint(LoRASpec(rank=lora_rank) if lora else spec, linears, heads)


def measure(name: str, wire: WireSettings) -> dict[str, Any]:
    """Bytes of one shape through one wire, by phase and section, with CPU seconds of both directions.

    Of updates also what the parts need at least, in bytes: `entropies`.
    """
    blueprint = shape_blueprint(name)
    found: dict[str, Any] = {"shape": name, "rows": blueprint.rows, "lora_float32": _lora_bytes(name)}
    for phase in PHASES:
        reference, exact = replayed_update(blueprint, phase)
        parts: dict[str, float] = {}
        started = time.process_time()
        blob = write_message(blueprint, phase, reference, exact, wire)
        if phase == "down":
            decode_state(blob, blueprint, {reference.digest: reference})
            seconds = time.process_time() - started
        else:
            rounded = decode_update(blob, blueprint, reference)
            seconds = time.process_time() - started
            parts = entropies(rounded, reference)
        sections = section_bytes(blob)
        head = sections.pop("head", 0)
        found[phase] = {
            "bytes": len(blob) - head,
            "head": head,
            "sections": sections,
            "seconds": seconds,
            "entropies": parts,
        }
    return found


def entropies(update: Update, reference: State) -> dict[str, float]:
    """Bytes that the parts of an update need at least, each stream told by its own frequencies: its sets,
    its gaps and the sections that are on steps; all others as they are."""
    found = {}
    for name, change in update.dense.items():
        step = update.steps.get(name, 0.0)
        whole = np.rint(change / step).astype(np.int64) if step else None
        found[name] = change.nbytes if whole is None else lane_entropy(whole) / 8
    if update.topk is not None and reference.topk is not None:
        streams = selection_streams(update.topk, reference.topk)
        found["sets"] = sum(map(entropy_bits, (*streams.sets, *streams.order))) / 8
        found["gaps"] = sum(map(entropy_bits, streams.gaps)) / 8 + len(streams.tail)
    return found


def run(target: Path | None) -> None:
    """Measure all shapes and print tables; `target` gets everything as JSON."""
    wires = {preset: [measure(name, wire) for name in SHAPES] for preset, wire in WIRES.items()}
    sets = [
        {"shape": name, "case": case, **sizes}
        for name in SHAPES
        for case, sizes in measure_sets(shape_blueprint(name)).items()
    ]
    churn = measure_churn()
    for preset, found in wires.items():
        print_table(f"--wire {preset}: kB a message", found, _size_columns(preset == "default"))
    print(*NOTES, "", sep="\n")
    parts = [
        {"shape": row["shape"], "phase": phase, **row[phase]}
        for row in wires["default"]
        for phase in ("first", "steady")
    ]
    print_table("--wire default: kB that the parts need at least, and what is sent", parts, _part_columns())
    print_table("Rows that keep their set, by phase of the recorded run", churn, _churn_columns())
    print_table("Sets of the rows: kB by coder", sets, _set_columns())
    print("kept: rows that keep their set; limit: log2 C(h, k) bits a row.")
    if target is not None:
        write_atomic(target, json.dumps({"wires": wires, "sets": sets, "churn": churn}, indent=1) + "\n")


Columns = dict[str, Callable[[Any], str]]


def _size_columns(targets: bool) -> Columns:
    def size(phase: str, at: int) -> Callable[[Any], str]:
        def show(row: Any) -> str:
            limit = TARGETS.get(row["shape"]) if targets else None
            return _kb(row[phase]["bytes"]) + (f" (≤ {limit[at]:g})" if limit else "")

        return show

    return {
        "shape": lambda row: row["shape"],
        "rows": lambda row: f"{row['rows']:,}",
        **{phase: size(phase, at) for at, phase in enumerate(PHASES)},
        "head": lambda row: _kb(row["steady"]["head"]),
        "bank": lambda row: _kb(row["steady"]["sections"].get("bank", 0)),
        "× LoRA": lambda row: f"{row['lora_float32'] / row['steady']['bytes']:,.0f}",
        "s": lambda row: f"{row['steady']['seconds']:.2f}",
    }


def _part_columns() -> Columns:
    def part(name: str) -> Callable[[Any], str]:
        return lambda row: _kb(row["entropies"].get(name, 0))

    def total(row: Any) -> float:
        return float(sum(row["entropies"].values()))

    return {
        "shape": lambda row: row["shape"],
        "update": lambda row: row["phase"],
        **{name: part(name) for name in ("bank", "head", "sets", "gaps")},
        "sum": lambda row: _kb(total(row)),
        "sent": lambda row: _kb(row["bytes"] + row["head"]),
        "more": lambda row: f"{(row['bytes'] + row['head']) / total(row) - 1:+.1%}",
    }


def _churn_columns() -> Columns:
    def share(name: str) -> Callable[[Any], str]:
        return lambda row: f"{row[name]:.1%}"

    names = ("same", "turned", "one new", "two new", "moved")
    return {"phase": lambda row: row["phase"], **{name: share(name) for name in names}}


def _set_columns() -> Columns:
    def size(name: str) -> Callable[[Any], str]:
        return lambda row: _kb(row[name]) if row[name] else "-"

    return {
        "shape": lambda row: row["shape"],
        "sets": lambda row: row["case"],
        "kept": lambda row: f"{row['kept']:.0%}",
        **{name: size(name) for name in ("limit", "packed", "zlib", "zstd", "ours", "with order")},
    }


def _lora_bytes(name: str) -> int:
    blueprint = shape_blueprint(name, lora=True)
    return 4 * math.prod(blueprint.dense_shapes["rows"])


def _kb(count: float) -> str:
    return f"{count / 1000:,.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, or record the run that is drawn from."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--study", type=Path, default=Path(__file__).parent / "studies" / "wire-sst2.json")
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="prepared by bench.learning")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recorded.npz")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if not given.record:
        run(given.json)
        return
    try:
        record({**read_study(given.study)[0], "model": given.model}, given.texts, given.out)
    except FedVBError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
