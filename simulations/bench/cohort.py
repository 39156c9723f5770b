"""What cohorts are worth, and what a round costs beside the training.

    fedvb bench cohort
    python -m simulations.bench.cohort --part gpu --json out.json    # needs torch and transformers alone

Parts: `gpu` trains at the shapes of real models, alone, in cohorts and with PEFT (MiniLM's shape where there
is no GPU); `cpu` is a round of MiniLM on this machine's cores, on our engine and on Flower's with Ray;
`overhead` is a round of clients that do no training; `scale` is the memory of a run with many clients.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from simulations.bench.steps import measure_shape
from simulations.bench.tables import print_table
from simulations.bench.timing import describe_machine
from vblora.files import write_atomic

__all__ = ["PARTS", "main", "run"]

TITLES = {
    "llama-1.1b": "1.1B Llama shape, 1 × 128 tokens a client-step",
    "llama-2-7b": "7B Llama shape, 1 × 256 tokens a client-step",
    "minilm": "MiniLM's shape, 8 × 32 tokens a client-step",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.cohort",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write all numbers here, after each part")
    parser.add_argument("--part", action="append", choices=PARTS, help="run this part alone; can be repeated")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions in turn; medians are shown")
    parser.add_argument("--shape", action="append", choices=TITLES, help="this shape alone; can be repeated")
    given = parser.parse_args(arguments)
    run(given.part or list(PARTS), given.json, given.repeats, given.shape)


def run(
    parts: Sequence[str], target: Path | None = None, repeats: int = 5, shapes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run parts, print their tables, and write their numbers to `target` as they come.

    Args:
        parts: of `PARTS`.
        target: a JSON file.
        repeats: of whatever is compared, in turn.
        shapes: of the part `gpu`; None chooses by device.
    """
    found: dict[str, Any] = {"machine": describe_machine(), "parts": {}}
    print(json.dumps(found["machine"]), flush=True)
    for part in parts:
        try:
            found["parts"][part] = PARTS[part](repeats, shapes)
        except ImportError as error:
            print(f"{part}: left out ({error})")
        if target is not None:
            write_atomic(target, json.dumps(found, indent=2) + "\n")
    return found


def _steps(repeats: int, shapes: Sequence[str] | None) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    found = {}
    for name in shapes or (("llama-1.1b", "llama-2-7b") if on_gpu else ("minilm",)):
        found[name] = measured = measure_shape(name, device, repeats, 17 if on_gpu else 5)
        columns = {
            "": lambda row: row["name"],
            "clients": lambda row: str(row["clients"]),
            "ms a step": lambda row: f"{row['step_ms']:.1f}",
            "steps/s": lambda row: f"{row['steps_per_second']:.2f}",
            "× alone": lambda row: f"{row['to_alone']:.2f}",
            "× PEFT r8": lambda row: _or_dash(row["to_peft"], ".2f"),
            "ms a client a round": lambda row: _or_dash(row["round_ms"], ".1f"),
            "peak GiB": lambda row: _or_dash(row["peak_gib"] or None, ".1f"),
        }
        print_table(TITLES[name], measured["rows"], columns, measured["notes"])
    return found


def _engines(repeats: int, shapes: Sequence[str] | None) -> dict[str, Any]:
    from simulations.bench.engines import measure_engines

    found = measure_engines(max(1, repeats // 2), clients=100, rounds=4)
    columns = {
        "engine": lambda row: row["engine"],
        "s a round": lambda row: f"{row['seconds']:.2f}",
        "× Ray": lambda row: _or_dash(row["to_ray"], ".3f"),
        "train loss": lambda row: f"{row['train_loss']:.6f}",
    }
    title = f"MiniLM, {found['clients']} clients of 2 steps of 8 × 32 tokens, {os.cpu_count()} cores"
    print_table(title, found["rows"], columns, found["notes"])
    return found


def _overhead(repeats: int, shapes: Sequence[str] | None) -> dict[str, Any]:
    from simulations.bench.crowd import measure_overhead
    from simulations.bench.engines import apart

    found: dict[str, Any] = apart(measure_overhead, 1000, repeats)
    rows = [
        {"what": f"opaque, {found['opaque_bytes']:,} B each way", "seconds": found["opaque_seconds"]},
        *(
            {
                "what": f"default wire, {row['update_bytes']:,} B up, processes: {row['processes']}",
                "seconds": row["seconds"],
            }
            for row in found["wire"]
        ),
    ]
    columns = {"payload": lambda row: row["what"], "s a round": lambda row: f"{row['seconds']:.3f}"}
    print_table(f"A round of {found['clients']:,} clients that do no training", rows, columns)
    return found


def _scale(repeats: int, shapes: Sequence[str] | None) -> dict[str, Any]:
    from simulations.bench.crowd import measure_scale
    from simulations.bench.engines import apart

    found: dict[str, Any] = apart(measure_scale, 10_000, 100, 20)
    stages = [("imports", found["mb_before"]), ("data and model", found["mb_with_data_and_model"])]
    stages += [(f"round {number}", size) for number, size in enumerate(found["mb_after_round"])]
    columns = {"after": lambda row: row[0], "MB": lambda row: f"{row[1]:.0f}"}
    print_table(
        f"Memory, {found['clients']:,} clients, {found['per_round']} a round: grows by "
        f"{found['mb_grown']:.1f} MB over {found['rounds']} rounds",
        [stage for at, stage in enumerate(stages) if at < 4 or at % 5 == 2],
        columns,
    )
    return found


PARTS: dict[str, Callable[[int, Sequence[str] | None], dict[str, Any]]] = {
    "gpu": _steps,
    "cpu": _engines,
    "overhead": _overhead,
    "scale": _scale,
}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main(sys.argv[1:])
