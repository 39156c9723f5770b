"""A plan as people and programs read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulations.memory_plan import GIB, Training
from simulations.paper import PUBLISHED, Count, count_published
from simulations.plan import AdapterPlan, Federation, Plan
from simulations.units import duration, size

__all__ = ["as_json", "paper_json", "paper_table", "plan_table"]

FITTING = 4  # settings that are shown of each adapter
WIDEST = 1000  # characters of a table
SHORT = 11  # characters of a heading that is not broken
Show = Callable[[AdapterPlan], str]
Lines = Mapping[str, Show]


def as_json(plan: Plan, federation: Federation) -> dict[str, Any]:
    """A plan as `--json` prints it. Bytes of `up_` and `down_` leave the task head out."""
    return {
        "model": plan.model,
        "parameters": plan.parameters,
        "step": {"texts": plan.device.rows, "tokens": plan.device.length},
        "classes": plan.classes,
        "clients": federation.clients,
        "rounds": federation.rounds,
        "link_bits_per_second": federation.bits_per_second,
        "adapters": {
            name: {
                **asdict(adapter),
                "spec": {"kind": adapter.spec.kind, **asdict(adapter.spec)},
                **_memory(adapter),
                "client_bytes": adapter.client_bytes(federation.rounds),
                "total_bytes": federation.clients * adapter.client_bytes(federation.rounds),
                "hours_on_link": adapter.hours(federation),
            }
            for name, adapter in plan.adapters.items()
        },
    }


def _memory(adapter: AdapterPlan) -> dict[str, Any]:
    """Bytes of a step, by part and in all, and of the settings that fit."""
    found: dict[str, Any] = {}
    if adapter.memory is not None:
        found["memory"] = {**asdict(adapter.memory), "device": adapter.memory.device}
    if adapter.fitting is not None:
        found["fitting"] = [
            {**asdict(training), "device_bytes": memory.device} for training, memory in adapter.fitting
        ]
    return found


def plan_table(console: Console, plan: Plan, federation: Federation) -> None:
    """Print a plan and what its figures stand for: one column an adapter where that fits the console, else
    one row. No number and no name is cut; where a console is too narrow for both, lines are longer."""
    told = Text(f"{plan.model}, {plan.parameters:,} parameters")
    parts = _parts(plan, federation)
    shown = [_by_column(plan, parts)]
    if _width(console, shown[0]) > console.width:
        shown = [_by_row(plan, lines) for lines in parts]
    console.print(told)
    for table in shown:
        _print_whole(console, table)
        if len(shown) > 1:
            console.print()
    for note in _notes(plan):
        console.print(note, markup=False, highlight=False)
    if plan.device.gib is not None:
        _print_fitting(console, plan)
    if counts := [count_published(entry) for entry in PUBLISHED if entry.model == plan.model.lower()]:
        _print_counts(console, counts)


def _width(console: Console, table: Table) -> int:
    """Characters of a line that cuts nothing."""
    return console.measure(table, options=console.options.update(width=WIDEST)).maximum


def _print_whole(console: Console, table: Table) -> None:
    """Print a table, on longer lines where the console is too narrow."""
    Console(file=console.file, width=max(console.width, _width(console, table))).print(table)


def _by_column(plan: Plan, parts: Sequence[Lines]) -> Table:
    """All figures in one table."""
    table = Table(box=ROUNDED)
    table.add_column("", no_wrap=True)
    for name in plan.adapters:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for lines in parts:
        for heading, show in lines.items():
            table.add_row(heading, *(show(adapter) for adapter in plan.adapters.values()))
    return table


def _by_row(plan: Plan, lines: Lines) -> Table:
    """Some of the figures; only headings are broken."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("adapter", no_wrap=True)
    for heading, show in lines.items():
        least = max(map(len, [*heading.split(), *(show(one) for one in plan.adapters.values())]))
        table.add_column("\n".join(wrap(heading, max(least, SHORT))), justify="right", no_wrap=True)
    for name, one in plan.adapters.items():
        table.add_row(Text(name), *(show(one) for show in lines.values()))
    return table


def paper_table(console: Console) -> None:
    """Print every setting that the paper publishes, counted again."""
    _print_counts(console, [count_published(entry) for entry in PUBLISHED])


def paper_json() -> list[dict[str, Any]]:
    """The same for programs; `fits` as in `Count`."""
    counts = map(count_published, PUBLISHED)
    return [{**asdict(count), "agrees": count.agrees} for count in counts]


def _parts(plan: Plan, federation: Federation) -> list[Lines]:
    """Headings and what each shows of an adapter: its sizes, a message, a whole run, a client's memory."""
    rounds, clients = federation.rounds, federation.clients
    headed = any(one.head for one in plan.adapters.values())
    head = ", head too" if headed else ""
    sizes: dict[str, Show] = {
        "sizes": _sizes,
        "rows S": lambda one: f"{one.rows:,}",
        "numbers trained": lambda one: f"{one.trained:,}",
        "numbers of a state": lambda one: f"{one.stored:,}",
    }
    message: dict[str, Show] = {
        "up, round 1": lambda one: size(one.up_bytes_first),
        "up, last third of the rounds": lambda one: size(one.up_bytes_steady),
        "down": lambda one: size(one.down_bytes),
        "up in float32": lambda one: size(one.float32_bytes),
    }
    if headed:
        sizes[f"numbers of the head, {plan.classes} classes"] = lambda one: f"{one.head:,}"
        message["the head up"] = lambda one: size(one.head_up_bytes)
        message["the head down"] = lambda one: size(one.head_down_bytes)
    whole: dict[str, Show] = {
        f"a client, {rounds:,} rounds{head}": lambda one: size(one.client_bytes(rounds)),
        f"   on {_speed(federation.bits_per_second)}": lambda one: duration(3600 * one.hours(federation)),
        f"{clients:,} clients{head}": lambda one: size(clients * one.client_bytes(rounds)),
    }
    if all(one.memory for one in plan.adapters.values()):
        whole[f"memory, {plan.device.rows} × {plan.device.length} tokens"] = _device_memory
        whole["   of it the adapter"] = lambda one: _gib(one.memory.adapter if one.memory else 0)
    return [sizes, message, whole]


def _device_memory(one: AdapterPlan) -> str:
    return _gib(one.memory.device if one.memory else 0)


def _sizes(one: AdapterPlan) -> str:
    spec = asdict(one.spec)
    shown = {"rank": "r", "num_vectors": "h", "vector_length": "b", "topk": "k", "theta_length": "d"}
    return ", ".join(f"{short} {spec[name]}" for name, short in shown.items() if name in spec)


def _notes(plan: Plan) -> list[str]:
    headed = any(one.head for one in plan.adapters.values())
    apart = "; the head counts apart where it is not named" if headed else ""
    notes = [f"Messages are encoded, their numbers drawn from a recorded run{apart}."]
    if any(one.memory for one in plan.adapters.values()):
        notes.append("Memory: predicted for a GPU, base in bfloat16, everything kept for the gradients.")
    if ratio := _against_lora(plan):
        notes.insert(0, ratio)
    for name, one in plan.adapters.items():
        if one.encoded_share < 1:
            notes.append(f"{name}: encoded for {one.encoded_share:.1%} of its factors and scaled up.")
    return notes


def _print_fitting(console: Console, plan: Plan) -> None:
    """Settings that fit the device, of each adapter the fastest few."""
    device = plan.device
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("adapter", "base", "for the gradients", "texts at once", "memory"):
        table.add_column(heading, justify="left" if heading in ("adapter", "base") else "right")
    for name, one in plan.adapters.items():
        for training, memory in (one.fitting or ())[:FITTING]:
            base = training.dtype if training.quantize == "none" else training.quantize
            pieces = -(-training.rows // training.accumulate)
            table.add_row(Text(name), base, _kept(training), str(pieces), _gib(memory.device))
        if not one.fitting:
            table.add_row(Text(name), "nothing fits", "", "", "")
    step = f"{device.rows} × {device.length} tokens"
    console.print(f"What fits {device.gib:g} GiB, steps of {step}, the fastest first:")
    _print_whole(console, table)


def _kept(training: Training) -> str:
    """What autograd keeps of a layer."""
    if training.checkpointing:
        return "layers made anew"
    return "inputs made anew" if training.recompute else "all is kept"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _against_lora(plan: Plan) -> str:
    """The smallest uplink against the largest LoRA in float32."""
    loras = {name: one for name, one in plan.adapters.items() if one.spec.kind == "lora"}
    if not loras:
        return ""
    largest = max(loras, key=lambda name: loras[name].float32_bytes)
    least = min(plan.adapters, key=lambda name: plan.adapters[name].up_bytes_first)
    lora, ours = loras[largest], plan.adapters[least]
    told = f"{least} sends 1/{_ratio(lora.float32_bytes, ours.up_bytes_first)} of {largest} in float32"
    if not lora.head:
        return f"{told} in round 1."
    whole = lora.float32_bytes + lora.head_float32_bytes, ours.up_bytes_first + ours.head_up_bytes
    return f"{told} in round 1 without the head, 1/{_ratio(*whole)} with it."


def _ratio(theirs: int, ours: int) -> str:
    return f"{theirs / ours:,.0f}"


def _print_counts(console: Console, counts: list[Count]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("model, layers", "r, h", "rows S", "paper", "hb + 1.5 S", "counted", "paper fits"):
        table.add_column(heading, justify="left" if heading == "model, layers" else "right", no_wrap=True)
    for count in counts:
        told = count.published
        table.add_row(
            f"{told.model} {'q,v' if told.targets == 'query,value' else 'all'}",
            f"{told.rank}, {told.num_vectors}",
            f"{count.rows:,}",
            f"{told.millions}M",
            f"{count.stated:,}",
            f"{count.counted:,}",
            "counted" if count.agrees else "?" if count.fits is None else f"{count.fits:g} S",
        )
    console.print("Numbers stored in the VB-LoRA paper's settings (b 256, k 2; no task head):")
    _print_whole(console, table)
    for note in (
        "hb + 1.5 S: the paper's formula, in float32 numbers, stated for h up to 256: indices of one byte.",
        "counted: the same with indices of two bytes above that.",
        "paper fits: what the printed figure says in place of 1.5 S, where it is not the one counted.",
    ):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _speed(bits: float) -> str:
    for unit, factor in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits >= factor:
            return f"{bits / factor:g} {unit}"
    return f"{bits:g} bit/s"
