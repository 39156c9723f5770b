"""Private, to be deleted after the measurement: microseconds of the products that an adapted layer adds.

python -m simulations.bench.probe --json probe.json      # torch alone, under a minute
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
SETS = 6  # of buffers, so that the L2 cache holds none of them


def timed(calls: list[Callable[[], Any]]) -> float:
    """Microseconds a call, from a graph of them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * 4:
            call()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * sorted(times)[3] / (4 * len(calls))


def kernels(call: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [event.name[:60] for event in profiler.events() if "CUDA" in str(event.device_type)]


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def products(m: int, k: int, n: int, r: int) -> dict[str, Callable[[int], Any]]:
    """By name, a call over the i-th set of buffers. k and n are the layer's in and out."""
    xs, gs, ws = ([bf16(*shape) for _ in range(SETS)] for shape in ((m, k), (m, n), (n, k)))
    a, b = bf16(r, k), bf16(r, n)
    inner, wide_inner = bf16(m, r), bf16(m, 3 * r)[:, :r]
    ys, dxs = [bf16(m, n) for _ in range(SETS)], [bf16(m, k) for _ in range(SETS)]
    out, wide_out = bf16(m, r), bf16(m, 3 * r)[:, :r]
    out_t = bf16(r, m)

    def linear_then_add(i: int) -> None:
        y = xs[i] @ ws[i].T
        y.unsqueeze(0).baddbmm_(inner.unsqueeze(0), b.unsqueeze(0))

    def addmm_then_linear(i: int) -> None:
        y = inner @ b
        y.addmm_(xs[i], ws[i].T)

    return {
        "linear": lambda i: xs[i] @ ws[i].T,
        "linear, baddbmm_": linear_then_add,
        "inner b, addmm_": addmm_then_linear,
        "inner b": lambda i: torch.mm(inner, b, out=ys[i]),
        "inner b (inner strided)": lambda i: torch.mm(wide_inner, b, out=ys[i]),
        "linear into": lambda i: torch.mm(xs[i], ws[i].T, out=ys[i]),
        "addmm_ into": lambda i: ys[i].addmm_(xs[i], ws[i].T),
        "dx": lambda i: torch.mm(gs[i], ws[i], out=dxs[i]),
        "dx addmm_": lambda i: dxs[i].addmm_(gs[i], ws[i]),
        "x a^T (mm)": lambda i: torch.mm(xs[i], a.T, out=out),
        "x a^T (mm, out strided)": lambda i: torch.mm(xs[i], a.T, out=wide_out),
        "x a^T (bmm)": lambda i: torch.bmm(xs[i][None], a.T[None]),
        "a x^T": lambda i: torch.mm(a, xs[i].T, out=out_t),
        "g b^T (mm)": lambda i: torch.mm(gs[i], b.T, out=out),
        "b g^T": lambda i: torch.mm(b, gs[i].T, out=out_t),
        "inner^T g": lambda i: torch.mm(inner.T, gs[i]),
        "inner^T g (inner strided)": lambda i: torch.mm(wide_inner.T, gs[i]),
        "inner^T g (bmm)": lambda i: torch.bmm(inner.T[None], gs[i][None]),
        "innert g": lambda i: torch.mm(out_t, gs[i]),
        "add": lambda i: torch.add(ys[i], gs[i], out=ys[i]),
    }


def main() -> None:
    found = []
    print(torch.cuda.get_device_name(), torch.__version__)
    for m in (256, 2048):
        for k, n in SHAPES:
            for r in (4, 8, 12, 16):
                calls = products(m, k, n, r)
                if r > 4:
                    calls = {name: call for name, call in calls.items() if "^T" in name or "inner b" in name}
                for name, call in calls.items():
                    micro = timed([functools.partial(call, i) for i in range(SETS)])
                    names = kernels(functools.partial(call, 0)) if r in (4, 12) and k == n else []
                    found.append([m, k, n, r, name, micro, names])
                    shown = f"{m:5d} {k:5d} -> {n:5d} r {r:2d}  {name:28s} {micro:8.1f} us"
                    print(shown, *names, sep="  ", flush=True)
                torch.cuda.empty_cache()
    if "--json" in sys.argv:
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
