"""What one client's training step costs: the frozen model alone, ours, PEFT's LoRA and VB-LoRA.

    fedvb bench step
    python -m simulations.bench.step --shape llama-2-7b --json out.json    # torch, transformers, peft alone

Random weights, bfloat16 on a GPU; adapters on all linear layers, in float32; AdamW included. All ways stand
over one copy of the base's weights and are run in turn. Without a GPU it is MiniLM's shape.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_client.batches import Batch
from fl_client.graphs import Graphs
from fl_client.passes import Passes
from simulations.bench.kernels import kernels, waits
from simulations.bench.shapes import SHAPES, Shape, build, twin
from simulations.bench.step_tables import markdown, show
from simulations.bench.timing import GIB, Sample, Way, describe_machine, tried
from simulations.bench.ways import (
    Run,
    adapt,
    adapter_bytes,
    cohort_run,
    frozen_step,
    graphed,
    make_batch,
    our_step,
    peft_model,
    peft_step,
    repeated,
    task_of,
)
from vblora.errors import raise_faults
from vblora.model import AdaptedModel
from vblora.state import State

__all__ = ["TOKENS", "Row", "main", "measure", "run"]

TOKENS = {
    "llama-2-7b": ("1x256", "4x512", "4x1024"),
    "llama-2-13b": ("1x256", "4x512", "4x1024"),
    "minilm": ("16x64",),
}
GRAPHED = 512  # tokens of a step at most: larger ones keep the GPU busy by themselves
FROZEN, OURS = "frozen base", "ours"


@dataclass(frozen=True)
class Row:
    """What one way came to; medians over the repetitions, ratios within each.

    Attributes:
        name: of the way.
        step_ms: of a step.
        to_base, to_ours: over the frozen base's (a graphed way's over the graphed base's) and over ours.
        peak_gib: of memory, the base included; 0 on a CPU.
        above: share of that above the frozen base's.
    """

    name: str
    step_ms: float
    to_base: float | None
    to_ours: float | None
    peak_gib: float
    above: float | None


@dataclass(frozen=True)
class Entry:
    """A way for any number of tokens; its adapter lives as long as it does."""

    name: str
    run: Callable[[Shape], Run]
    own_bytes: int = 0
    graphed: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write all numbers here, after each table")
    parser.add_argument("--shape", action="append", choices=TOKENS, help="this alone; can be repeated")
    parser.add_argument("--tokens", action="append", help="texts x tokens of a step; can be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions in turn; medians are shown")
    parser.add_argument("--table", type=Path, help="print what such a file holds as Markdown, and end")
    given = parser.parse_args(arguments)
    if given.table is not None:
        print(markdown(json.loads(given.table.read_text())))
        return
    run(given.shape, given.tokens, given.json, given.repeats)


def run(
    shapes: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    target: Path | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure, print a table for each shape and number of tokens, and write the numbers as they come.

    Args:
        shapes: of `TOKENS`; None chooses by device.
        tokens: such as "4x512"; None takes those of the shape.
        target: a JSON file.
        repeats: of all ways in turn.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raise_faults("bench step", _faults(shapes or (), tokens or ()))
    found: dict[str, Any] = {"machine": describe_machine(), "tables": []}
    print(json.dumps(found["machine"]), flush=True)
    for name in shapes or (("llama-2-7b", "llama-2-13b") if device.type == "cuda" else ("minilm",)):
        for table in measure(name, tokens or TOKENS[name], device, repeats):
            found["tables"].append(table)
            show(table)
            if target is not None:
                target.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _faults(shapes: Sequence[str], tokens: Sequence[str]) -> Iterator[str]:
    for name in shapes:
        if name not in TOKENS:
            yield f"--shape is {name}, expected {', '.join(TOKENS)}"
    for size in tokens:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            yield f"--tokens is {size}, expected texts x tokens of each, such as 4x512"


def measure(
    name: str, tokens: Sequence[str], device: torch.device, repeats: int, steps: int = 3
) -> Iterator[dict[str, Any]]:
    """One table for each number of tokens, for JSON; the first step of each run is not counted.

    Args:
        name: of the shape.
        tokens: such as "4x512".
        device: where.
        repeats: of all ways in turn, after one that warms up.
        steps: of each way in a repetition, at least 2.
    """
    shape = SHAPES[name]
    base = build(shape, device).requires_grad_(False).eval()
    base_bytes = sum(value.nbytes for value in base.parameters())
    notes: list[str] = []
    entries = list(_entries(shape, base, notes))
    for size in tokens:
        rows, length = (int(number) for number in size.split("x"))
        sized = replace(shape, rows=rows, length=length)
        small = device.type == "cuda" and rows * length <= GRAPHED
        ways = [
            Way(entry.name, 1, entry.run(sized), entry.own_bytes)
            for entry in entries
            if small or not entry.graphed
        ]
        own_notes = [*notes]
        samples = _in_turn(ways, device, repeats, steps, own_notes)
        found = [asdict(row) for row in _rows(ways, samples, base_bytes)]
        facts = _facts(sized, base, device) if device.type == "cuda" else {}
        yield {"shape": name, "tokens": size, "repeats": repeats, "notes": own_notes, "rows": found, **facts}
        del ways
        gc.collect()


def _entries(shape: Shape, base: nn.Module, notes: list[str]) -> Iterator[Entry]:
    """All ways over the weights of `base`, which itself stays as it is."""
    task = task_of(shape)
    device = next(base.parameters()).device
    model, state = adapt(shape, twin(base))
    lean, _ = adapt(shape, twin(base), recompute=True)
    yield Entry(FROZEN, lambda sized: repeated(frozen_step(base, task), sized, device))
    yield Entry(OURS, lambda sized: cohort_run(model, state, sized, 1))
    yield Entry(f"{OURS}, inputs recomputed", lambda sized: cohort_run(lean, state, sized, 1))
    if device.type == "cuda":
        fused, _ = adapt(shape, twin(base), fused=True)
        both, _ = adapt(shape, twin(base), recompute=True, fused=True)
        frozen = partial(frozen_step, base, task)
        yield Entry(f"{OURS}, norms fused", lambda sized: cohort_run(fused, state, sized, 1))
        yield Entry(f"{OURS}, both", lambda sized: cohort_run(both, state, sized, 1))
        yield Entry(f"{FROZEN}, graphed", lambda sized: graphed(frozen, sized, device), graphed=True)
        for name, held in ((OURS, model), (f"{OURS}, norms fused", fused)):
            yield Entry(f"{name}, graphed", _replayed(held, state), graphed=True)
    for name, config, autocast in _rivals(shape, device, notes):
        theirs = peft_model(base, config, autocast=autocast)
        yield Entry(name, _peft(theirs, shape, device), adapter_bytes(theirs))


def _replayed(model: AdaptedModel, state: State) -> Callable[[Shape], Run]:
    return lambda sized: cohort_run(model, state, sized, 1, Graphs())


def _peft(model: nn.Module, shape: Shape, device: torch.device) -> Callable[[Shape], Run]:
    step = peft_step(model, task_of(shape))
    return lambda sized: repeated(step, sized, device)


def _rivals(shape: Shape, device: torch.device, notes: list[str]) -> Iterator[tuple[str, Any, bool]]:
    """PEFT's ways: name, configuration, whether its factors are in float32 beside a bfloat16 base."""
    try:
        from peft import LoraConfig, VBLoRAConfig
    except ImportError:
        notes.append("PEFT is not installed: its rows are left out")
        return
    kind = "SEQ_CLS" if task_of(shape).labels else "CAUSAL_LM"
    options: dict[str, Any] = {"target_modules": "all-linear", "task_type": kind}
    for rank in (4, 64) if device.type == "cuda" else (4, 8):
        yield f"peft lora r{rank}", LoraConfig(r=rank, lora_alpha=2 * rank, **options), True
    if device.type == "cuda":
        yield "peft lora r4, bf16 factors", LoraConfig(r=4, lora_alpha=8, **options), False
    options |= {"num_vectors": shape.num_vectors, "vector_length": shape.vector_length}
    yield f"peft vb-lora r{shape.rank}", VBLoRAConfig(r=shape.rank, **options), True


def _in_turn(
    ways: list[Way], device: torch.device, repeats: int, steps: int, notes: list[str]
) -> dict[str, list[Sample]]:
    """Samples by way. One that runs out of memory leaves `ways`, with a note."""
    samples: dict[str, list[Sample]] = {way.name: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in list(ways):
            found = tried(way, steps if repeat else 2, device)
            if found is None:
                notes.append(f"{way.name}: out of memory")
                ways.remove(way)
            elif repeat:
                samples[way.name].append(found)
    return samples


def _rows(ways: Sequence[Way], samples: dict[str, list[Sample]], base_bytes: int) -> Iterator[Row]:
    times = {way.name: [sample.step for sample in samples[way.name]] for way in ways}
    peaks = {
        way.name: base_bytes + way.own_bytes + max(sample.peak for sample in samples[way.name])
        for way in ways
    }
    measured = any(sample.peak for found in samples.values() for sample in found)
    for way in ways:
        floor = f"{FROZEN}, graphed" if way.name.endswith("graphed") else FROZEN
        yield Row(
            name=way.name,
            step_ms=1e3 * statistics.median(times[way.name]),
            to_base=_ratio(times, way.name, floor),
            to_ours=_ratio(times, way.name, OURS),
            peak_gib=peaks[way.name] / GIB if measured else 0.0,
            above=peaks[way.name] / peaks[FROZEN] - 1 if measured and FROZEN in peaks else None,
        )


def _ratio(times: dict[str, list[float]], name: str, to: str) -> float | None:
    if to not in times:
        return None
    return statistics.median(one / other for one, other in zip(times[name], times[to], strict=True))


def _facts(shape: Shape, base: nn.Module, device: torch.device) -> dict[str, Any]:
    """Kernels of one step, where it waits for the device, and how near the faster ways come to ours."""
    task = task_of(shape)
    model, state = adapt(shape, twin(base))
    fused, _ = adapt(shape, twin(base), fused=True)
    batch = make_batch(shape, task, device)
    found: dict[str, Any] = {"kernels": {}, "waits": {}, "errors": {}}
    steps = {
        FROZEN: frozen_step(base, task),
        OURS: our_step(model, task, state),
        f"{OURS}, norms fused": our_step(fused, task, state),
    }
    for name, step in steps.items():
        step(batch)
        found["waits"][name] = waits(step, batch)
        found["kernels"][name] = kernels(step, batch)
    tensors = model.load(state)
    eager = _bank_gradient(Passes(model, task), tensors, batch)
    others = {"norms fused": Passes(fused, task)}
    if shape.rows * shape.length <= GRAPHED:
        others["graphed"] = Passes(model, task, Graphs())
    for name, passes in others.items():
        other = _bank_gradient(passes, passes.model.load(state), batch)
        found["errors"][name] = float((other - eager).norm() / eager.norm())
    return found


def _bank_gradient(passes: Passes, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
    return passes.gradients(tensors, tensors, [batch], 1)[1]["bank"]


if __name__ == "__main__":
    main(sys.argv[1:])
