"""Ways of training over the same base weights: ours, PEFT's, and the frozen model alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_client.batches import Batch, collate
from fl_client.graphs import Graphs
from fl_client.optim import AdamW
from fl_client.passes import Passes
from fl_client.tasks import CausalLM, Classification, Task
from fl_client.train import Job, LocalSettings, train_cohort
from simulations.bench.shapes import LABELS, Shape, make_examples, twin
from simulations.bench.timing import Clock, Sample
from vblora.model import AdaptedModel, describe_base, find_head, find_linears
from vblora.norms import fuse_norms
from vblora.spec import Blueprint, VBLoRASpec
from vblora.state import State, initial_state

__all__ = [
    "Run",
    "Step",
    "adapt",
    "adapter_bytes",
    "cohort_run",
    "frozen_step",
    "graphed",
    "make_batch",
    "our_step",
    "peft_model",
    "peft_step",
    "repeated",
    "task_of",
]

Run = Callable[[int], Sample]
Step = Callable[[Batch], None]


def task_of(shape: Shape) -> Task:
    return Classification(LABELS) if "num_labels" in shape.sizes else CausalLM()


def make_batch(shape: Shape, task: Task, device: torch.device) -> Batch:
    examples = make_examples(shape, 0, bool(task.labels))
    return collate([(examples, np.arange(shape.rows))], 0, device)


# --- Ours ----------------------------------------------------------------------------


def adapt(
    shape: Shape, base: nn.Module, *, recompute: bool = False, fused: bool = False
) -> tuple[AdaptedModel, State]:
    """VB-LoRA put into `base`, and its start."""
    if fused:
        fuse_norms(base)
    spec = VBLoRASpec(rank=shape.rank, num_vectors=shape.num_vectors, vector_length=shape.vector_length)
    labels = task_of(shape).labels
    blueprint = Blueprint(spec, find_linears(base), find_head(base), describe_base(base), labels)
    return AdaptedModel(base, blueprint, recompute=recompute), initial_state(blueprint)


def cohort_run(
    model: AdaptedModel, state: State, shape: Shape, clients: int, graphs: Graphs | None = None
) -> Run:
    """As rounds train: `train_cohort` itself."""
    task, peaks = task_of(shape), [0]

    def run(steps: int) -> Sample:
        jobs = [Job(str(at), make_examples(shape, at, bool(task.labels)), (0, at)) for at in range(clients)]
        settings = LocalSettings(steps=steps, batch_size=shape.rows)
        clock = Clock(model.device)
        train_cohort(model, task, state, jobs, settings, graphs=graphs, on_step=clock.on_step)
        sample = clock.sample()
        peaks.append(sample.peak)  # a graph takes its memory in the first run
        return replace(sample, peak=max(peaks) if graphs else sample.peak)

    return run


def our_step(model: AdaptedModel, task: Task, state: State, graphs: Graphs | None = None) -> Step:
    """One step of one client over a batch that is on its device, as `train_cohort` takes it."""
    tensors, passes = model.load(state), Passes(model, task, graphs)
    optimiser = AdamW(LocalSettings().rates(model.blueprint.spec.kind, 1.0))

    def step(batch: Batch) -> None:
        _, found = passes.gradients(tensors, tensors, [batch], 1)
        optimiser.step(tensors, found, None)

    return step


# --- Others --------------------------------------------------------------------------


def repeated(step: Step, shape: Shape, device: torch.device) -> Run:
    """A run of one call a step; each brings its batch to the device."""
    task = task_of(shape)

    def run(steps: int) -> Sample:
        clock = Clock(device)
        for number in range(steps):
            step(make_batch(shape, task, device))
            clock.on_step(number + 1, steps)
        return clock.sample()

    return run


def graphed(make: Callable[[], Step], shape: Shape, device: torch.device) -> Run:
    """A run that replays one step captured as a CUDA graph. It is captured in the first run."""
    task = task_of(shape)
    captured: list[tuple[Step, torch.cuda.CUDAGraph, Batch, int]] = []

    def run(steps: int) -> Sample:
        if not captured:
            step = make()  # kept: the graph reads and writes what it holds
            captured.append((step, *_capture(step, make_batch(shape, task, device))))
        _, graph, held, peak = captured[0]
        clock = Clock(device)
        for number in range(steps):
            batch = make_batch(shape, task, device)
            held.tokens.copy_(batch.tokens, non_blocking=True)
            graph.replay()
            clock.on_step(number + 1, steps)
        return replace(clock.sample(), peak=peak)

    return run


def _capture(step: Step, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, int]:
    """The graph of a step, the batch that it reads, and bytes at its peak."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(batch)
    return graph, batch, torch.cuda.max_memory_allocated() - before


def frozen_step(base: nn.Module, task: Task) -> Step:
    """Forward and the gradients of all activations, no adapter: no adapter can be faster."""
    embeddings: Any = base.get_input_embeddings()  # type: ignore[operator]

    def step(batch: Batch) -> None:
        entered = embeddings(batch.tokens).requires_grad_()
        torch.autograd.grad(_loss(base, task, batch, inputs_embeds=entered), entered)

    return step


def peft_model(base: nn.Module, config: Any, *, autocast: bool = True) -> nn.Module:
    """PEFT's model over the weights of `base`, ready to train.

    `autocast` is PEFT's default: factors in float32 beside a bfloat16 base.
    """
    from peft import get_peft_model

    model: nn.Module = get_peft_model(twin(base), config, autocast_adapter_dtype=autocast)
    return model.train()


def peft_step(model: nn.Module, task: Task) -> Step:
    """A step as PEFT's users take it; AdamW is fused on a GPU."""
    trained = _trained(model)
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=trained[0].device.type == "cuda")

    def step(batch: Batch) -> None:
        _loss(model, task, batch, input_ids=batch.tokens).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()

    return step


def adapter_bytes(model: nn.Module) -> int:
    """What PEFT's model holds between steps beside the base: trained values and both moments of Adam."""
    return 3 * sum(value.nbytes for value in _trained(model))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def _loss(model: nn.Module, task: Task, batch: Batch, **inputs: Tensor) -> Tensor:
    logits = model(**inputs, attention_mask=batch.mask).logits
    return task.losses(logits, batch, 1).sum()
