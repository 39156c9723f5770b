"""Scores of a cohort: C clients' states on their own texts in one forward. Alone is a cohort of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fl_client.batches import Examples, by_length, collate
from fl_client.tasks import SUMS, Task
from vblora.model import AdaptedModel
from vblora.state import State

__all__ = ["CPU_TOKENS", "GPU_TOKENS", "OnBatch", "evaluate", "evaluate_cohort"]

OnBatch = Callable[[int, int], object]  # called with (batches done, batches in all)

CPU_TOKENS, GPU_TOKENS = 1 << 10, 1 << 14  # of a batch: what keeps a CPU's caches, or a GPU, busy


def evaluate(
    model: AdaptedModel,
    task: Task,
    state: State,
    examples: Examples,
    *,
    batch_tokens: int | None = None,
    pad: int = 0,
    on_batch: OnBatch | None = None,
) -> dict[str, float]:
    """Sums of the task's metrics over `examples` under one state: `evaluate_cohort` of one."""
    options: Any = {"batch_tokens": batch_tokens, "pad": pad, "on_batch": on_batch}
    return evaluate_cohort(model, task, [state], [examples], **options)[0]


@torch.no_grad()
def evaluate_cohort(
    model: AdaptedModel,
    task: Task,
    states: Sequence[State],
    parts: Sequence[Examples],
    *,
    batch_tokens: int | None = None,
    pad: int = 0,
    on_batch: OnBatch | None = None,
) -> list[dict[str, float]]:
    """Sums of the task's metrics of C clients, zeros for one without texts; batched by length.

    Args:
        model: the base with the adapter in place; its binding is used and released.
        task: gives the sums.
        states: what each client is scored with.
        parts: the texts of each.
        batch_tokens: of all clients together in a batch, at most; None takes what suits the device.
        pad: token id of padding.
        on_batch: told the batches; it may raise, and what it says does not count.
    """
    most = batch_tokens or (CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS)
    plans = [by_length(examples, max(1, most // len(parts))) for examples in parts]
    sums: list[dict[str, float]] = [dict.fromkeys(SUMS, 0) for _ in parts]
    nothing = np.empty(0, np.int64)
    model.bind(model.load(*states))
    try:
        steps = max(map(len, plans))
        for step in range(steps):
            rows = [plan[step] if step < len(plan) else nothing for plan in plans]
            batch = collate(list(zip(parts, rows, strict=True)), pad, model.device)
            logits = model(**batch.inputs).logits.chunk(len(parts))
            for own, its_logits, its_batch in zip(sums, logits, batch.chunk(len(parts)), strict=True):
                for name, value in task.sums(its_logits, its_batch).items():
                    own[name] += value
            if on_batch is not None:
                on_batch(step + 1, steps)
    finally:
        model.unbind()
    return sums
