"""Client-steps per second: one client at a time, in cohorts, and as PEFT trains LoRA, in turn.

Needs torch and transformers; PEFT's rows are left out where it is not installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from simulations.bench.shapes import SHAPES, Shape, build
from simulations.bench.timing import GIB, Sample, Way, tried
from simulations.bench.ways import (
    adapt,
    adapter_bytes,
    cohort_run,
    peft_model,
    peft_step,
    repeated,
    task_of,
)

__all__ = ["Row", "measure_shape"]


@dataclass(frozen=True)
class Row:
    """What one way of training came to; medians over the repetitions.

    Attributes:
        name: vb-lora or a variant of PEFT.
        clients: side by side.
        step_ms: of all clients together, AdamW included.
        steps_per_second: of all clients together.
        to_alone, to_peft: that, over one VB-LoRA client at a time and over PEFT LoRA r8; the median of the
            ratios within each repetition.
        round_ms: what a client's round costs beside its steps: loading the state, reading the update.
        peak_gib: of memory, the base included; 0 on a CPU.
    """

    name: str
    clients: int
    step_ms: float
    steps_per_second: float
    to_alone: float
    to_peft: float | None
    round_ms: float | None
    peak_gib: float


def measure_shape(name: str, device: torch.device, repeats: int, steps: int) -> dict[str, Any]:
    """Train in each way, one after another, `repeats` times over. Returns notes, facts and rows for JSON.

    Args:
        name: one of `SHAPES`.
        device: where.
        repeats: of all ways in turn, after one that warms up.
        steps: timed in each, at least 2.
    """
    shape = SHAPES[name]
    base = build(shape, device)
    base_bytes = sum(value.nbytes for value in base.parameters())
    notes: list[str] = []
    ways = list(_ways(shape, base, device, notes))
    samples: dict[str, list[Sample]] = {_key(way): [] for way in ways}
    for repeat in range(repeats + 1):
        for way in list(ways):
            found = tried(way, 3 if repeat == 0 else steps, device)
            if found is None:
                notes.append(f"{_key(way)}: out of memory")
                ways.remove(way)
                del samples[_key(way)]
            elif repeat:
                samples[_key(way)].append(found)
    rows = [asdict(row) for row in _rows(ways, samples, base_bytes)]
    facts = {"parameters": sum(value.numel() for value in base.parameters()), "base_gib": base_bytes / GIB}
    return {"shape": asdict(shape), **facts, "notes": notes, "repeats": repeats, "steps": steps, "rows": rows}


def _ways(shape: Shape, base: nn.Module, device: torch.device, notes: list[str]) -> Iterator[Way]:
    """PEFT's models share the weights of `base`; they are made before it is adapted."""
    rivals = list(_peft_ways(shape, base, device, notes))
    model, state = adapt(shape, base)
    for clients in shape.cohorts:
        yield Way(f"vb-lora r{shape.rank}", clients, cohort_run(model, state, shape, clients))
    yield from rivals


def _peft_ways(shape: Shape, base: nn.Module, device: torch.device, notes: list[str]) -> Iterator[Way]:
    try:
        from peft import LoraConfig
    except ImportError:
        notes.append("PEFT is not installed: its rows are left out")
        return
    task = task_of(shape)
    kind = "SEQ_CLS" if task.labels else "CAUSAL_LM"
    variants = [("peft lora r8", 8, True), ("peft lora r4", 4, True)]
    if device.type != "cpu":  # PEFT keeps factors in float32 beside a bfloat16 base unless told not to
        variants.append(("peft lora r4, bf16 factors", 4, False))
    for name, rank, autocast in variants:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
        model = peft_model(base, config, autocast=autocast)
        yield Way(name, 1, repeated(peft_step(model, task), shape, device), adapter_bytes(model))


def _rows(ways: list[Way], samples: dict[str, list[Sample]], base_bytes: int) -> Iterator[Row]:
    rates = {
        _key(way): np.array([way.clients / sample.step for sample in samples[_key(way)]]) for way in ways
    }
    alone, peft = rates[_key(ways[0])], rates.get("peft lora r8 × 1")
    for way in ways:
        found, rate = samples[_key(way)], rates[_key(way)]
        rest = statistics.median(sample.rest for sample in found) / way.clients
        yield Row(
            name=way.name,
            clients=way.clients,
            step_ms=1e3 * statistics.median(sample.step for sample in found),
            steps_per_second=float(np.median(rate)),
            to_alone=float(np.median(rate / alone)),
            to_peft=None if peft is None else float(np.median(rate / peft)),
            round_ms=1e3 * rest if way.name.startswith("vb") else None,
            peak_gib=(base_bytes + way.own_bytes + max(sample.peak for sample in found)) / GIB
            if any(sample.peak for sample in found)
            else 0.0,
        )


def _key(way: Way) -> str:
    return f"{way.name} × {way.clients}"
