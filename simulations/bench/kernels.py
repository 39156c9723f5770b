"""What a GPU is asked to do in a step: kernels, and places in the code that wait for it."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fl_client.batches import Batch
from simulations.bench.ways import Step

__all__ = ["kernels", "waits"]


def waits(step: Step, batch: Batch) -> dict[str, int]:
    """Places in the code that made the CPU wait for the GPU, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{warning.filename}:{warning.lineno}" for warning in caught)
    return {"/".join(place.split("/")[-3:]): count for place, count in places.items()}


def kernels(step: Step, batch: Batch) -> dict[str, Any]:
    """How many kernels a step launches, how long they take, and the 30 that take longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batch)
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.elapsed_us() / 1e3)
        for event in profiler.events() or []
        if str(event.device_type).endswith("CUDA")
    ]
    counts = Counter(name for name, _ in spans)
    total: dict[str, float] = dict.fromkeys(counts, 0.0)
    for name, milliseconds in spans:
        total[name] += milliseconds
    busiest = sorted(total.items(), key=lambda item: -item[1])[:30]
    longest = [(name[:120], counts[name], round(value, 3)) for name, value in busiest]
    return {"count": len(spans), "busy_ms": sum(total.values()), "longest": longest}
