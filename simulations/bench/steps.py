"""Client-steps per second: one client at a time, in cohorts, and as PEFT trains LoRA, in turn.

Needs torch and transformers; PEFT's rows are left out where it is not installed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fl_client.batches import collate
from fl_client.tasks import CausalLM, Classification, Task
from fl_client.train import Job, LocalSettings, train_cohort
from simulations.bench.shapes import LABELS, SHAPES, Shape, build, make_examples, twin
from vblora.model import AdaptedModel, describe_base, find_head, find_linears
from vblora.spec import Blueprint, VBLoRASpec
from vblora.state import initial_state

__all__ = ["Row", "measure_shape"]

GIB = 1 << 30


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


@dataclass(frozen=True)
class Sample:
    """One repetition: seconds of a step and of all that is no step; bytes above the base."""

    step: float
    rest: float
    peak: int


@dataclass(frozen=True)
class Way:
    """One way of training: takes so many steps, tells how long they took."""

    name: str
    clients: int
    run: Callable[[int], Sample]
    own_bytes: int = 0


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
            found = _tried(way, 3 if repeat == 0 else steps, device)
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
    head = find_head(base)
    task: Task = Classification(LABELS) if head else CausalLM()
    rivals = list(_peft_ways(shape, base, task, device, notes))
    linears = find_linears(base)
    spec = VBLoRASpec(rank=4, num_vectors=shape.num_vectors, vector_length=shape.vector_length)
    blueprint = Blueprint(spec, linears, head, describe_base(base), task.labels)
    model, state = AdaptedModel(base, blueprint), initial_state(blueprint)

    def cohort(clients: int) -> Callable[[int], Sample]:
        def run(steps: int) -> Sample:
            jobs = [Job(str(at), make_examples(shape, at, bool(head)), (0, at)) for at in range(clients)]
            settings = LocalSettings(steps=steps, batch_size=shape.rows)
            clock = Clock(device)
            train_cohort(model, task, state, jobs, settings, on_step=clock.on_step)
            return clock.sample()

        return run

    for clients in shape.cohorts:
        yield Way("vb-lora r4", clients, cohort(clients))
    yield from rivals


def _peft_ways(
    shape: Shape, base: nn.Module, task: Task, device: torch.device, notes: list[str]
) -> Iterator[Way]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        notes.append("PEFT is not installed: its rows are left out")
        return
    kind = "SEQ_CLS" if task.labels else "CAUSAL_LM"
    variants = [("peft lora r8", 8, True), ("peft lora r4", 4, True)]
    if device.type != "cpu":  # PEFT keeps factors in float32 beside a bfloat16 base unless told not to
        variants.append(("peft lora r4, bf16 factors", 4, False))
    for name, rank, autocast in variants:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
        model = get_peft_model(twin(base), config, autocast_adapter_dtype=autocast).eval()
        trained = [value for value in model.parameters() if value.requires_grad]
        own = sum(value.nbytes for value in trained)
        yield Way(name, 1, _peft_run(shape, model, trained, task, device), own)


def _peft_run(
    shape: Shape, model: nn.Module, trained: list[nn.Parameter], task: Task, device: torch.device
) -> Callable[[int], Sample]:
    def run(steps: int) -> Sample:
        examples = make_examples(shape, 0, bool(task.labels))
        optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
        clock = Clock(device)
        for step in range(steps):
            batch = collate([(examples, np.arange(shape.rows))], 0, device)
            labels = batch.targets if task.labels else batch.tokens
            model(input_ids=batch.tokens, attention_mask=batch.mask, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            clock.on_step(step + 1, steps)
        return clock.sample()

    return run


class Clock:
    """Times a run from its own calls after each step: the steps after the first, and what is left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        self._started = self._now()

    def on_step(self, done: int, steps: int) -> None:
        if done == 1:
            self._first = self._now()
        if done == steps:
            self._step = (self._now() - self._first) / (steps - 1)
            self._steps = steps

    def sample(self) -> Sample:
        rest = self._now() - self._started - self._steps * self._step
        on_gpu = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) - self._before if on_gpu else 0
        return Sample(self._step, rest, peak)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _rows(ways: list[Way], samples: dict[str, list[Sample]], base_bytes: int) -> Iterator[Row]:
    rates = {
        _key(way): np.array([way.clients / sample.step for sample in samples[_key(way)]]) for way in ways
    }
    alone, peft = rates["vb-lora r4 × 1"], rates.get("peft lora r8 × 1")
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


def _tried(way: Way, steps: int, device: torch.device) -> Sample | None:
    """None where there is no memory for it."""
    found = None
    with suppress(torch.OutOfMemoryError):
        found = way.run(steps)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _key(way: Way) -> str:
    return f"{way.name} × {way.clients}"
