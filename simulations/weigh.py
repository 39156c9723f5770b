"""Commands that weigh adapters: `fedvb plan` before anything is trained, `fedvb compare` by training them."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from simulations.options import command_line, config_of, run_options
from vblora.errors import ConfigError

__all__ = ["add_commands"]

# Of an adapter and its messages: what changes no size. The recorded run, from which a plan draws, has k = 2.
UNPLANNED = ("adapter", "start", "alpha", "topk", "wire-feedback")
# An adapter of a file would be every contender's. LoRA, which all are compared with, has no bank to freeze
# and no logits to keep; with a head of each client's own the score of what is shared says nothing.
UNCOMPARED = ("adapter", "start", "personal", "freeze-bank", "late-clients")

console = Console()


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    for command in (plan, compare):
        app.command()(command)


@run_options(("Adapter", "Wire"), without=UNPLANNED)
def plan(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A known model such as llama-2-13b, a config.json, a folder, or a hub id.")
    ] = "",
    adapters: Annotated[
        str,
        typer.Option(
            help="KIND or KIND:NUMBER, by comma: the rank of lora, ffa-lora, lora-xs; h of vblora and "
            "bank-only; d of uni-lora."
        ),
    ] = "vblora,lora:8",
    clients: Annotated[int, typer.Option(help="Clients that train in a round.")] = 10,
    rounds: Annotated[int, typer.Option(help="Rounds of training.")] = 10,
    link: Annotated[str, typer.Option(help="Speed of one client's link: kbit, mbit or gbit.")] = "20mbit",
    classes: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="INTEGER", help="Of a task head; 0 models language. Else 2 for an encoder."
        ),
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(help="GiB of a client's GPU: print which settings fit.", metavar="FLOAT")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts of a step, for the memory.")] = 4,
    max_length: Annotated[int, typer.Option(help="Tokens of a text, for the memory.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print numbers as JSON.")] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="Print the parameter counts of the VB-LoRA paper, counted again.")
    ] = False,
    **given: Any,
) -> None:
    """Tell what adapters cost to communicate, before anything is trained.

    Needs no weights, no texts and, for known models, no network. Bytes are
    those of encoded messages, their numbers drawn from a recorded run.

    Examples:

      fedvb plan --model llama-2-13b --adapters vblora,lora:64 --rank 6
      fedvb plan --model ./llama/config.json --adapters vblora --link 5mbit
      fedvb plan --model llama-2-7b --device-memory 8
      fedvb plan --paper
    """
    from simulations.adapters import parse_adapters
    from simulations.plan import Device, Federation, plan_adapters
    from simulations.plan_tables import as_json, paper_json, paper_table, plan_table

    if paper:
        if json:
            print(json_module.dumps(paper_json(), indent=2))
        else:
            paper_table(console)
        return
    if not model:
        raise ConfigError("--model: which one? such as llama-2-13b, or a config.json")
    federation, device = Federation(clients, rounds, link), Device(device_memory, batch_size, max_length)
    found = plan_adapters(model, classes, parse_adapters(adapters), config_of(given), device)
    if json:
        print(json_module.dumps(as_json(found, federation), indent=2))
    else:
        plan_table(console, found, federation)


@run_options(without=UNCOMPARED)
def compare(
    context: typer.Context,
    adapters: Annotated[
        str,
        typer.Option(
            help="KIND or KIND:NUMBER, by comma, a LoRA among them: vblora, lora:8, ffa-lora:8, lora-xs:32, "
            "uni-lora:32768, bank-only.",
            rich_help_panel="Comparison",
        ),
    ] = "vblora,lora:8",
    seeds: Annotated[
        int, typer.Option(help="Runs of each adapter, from --seed on.", rich_help_panel="Comparison")
    ] = 3,
    tune: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="INTEGER",
            help="Seeds that three rates of each adapter are tried with first, on a part of the training "
            "texts; 0 takes the rates as they are. Else 1, and 0 with one seed.",
            rich_help_panel="Comparison",
        ),
    ] = None,
    at_once: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="INTEGER",
            help="Runs at a time; 0 is one on a GPU, and what ends sooner on a CPU.",
            rich_help_panel="Comparison",
        ),
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Directory; what is finished there is kept.", rich_help_panel="Comparison")
    ] = Path("runs/comparison"),
    **given: Any,
) -> None:
    """Train adapters under one protocol, and tell what each costs to communicate.

    The first LoRA is the baseline, with its messages in float32; it runs
    through the codec too. Stopped anyhow, the same command goes on. Leaves
    report.html, comparison.json, comparison.md and pictures.

    Examples:

      fedvb compare --seeds 1
      fedvb compare --data reviews.csv --adapters vblora,lora:8,lora:32 --seeds 5
    """
    from simulations.adapters import parse_adapters
    from simulations.bench.tables import print_table
    from simulations.compare.files import unreported, write_files
    from simulations.compare.protocol import Protocol, contenders
    from simulations.compare.study import compare as run
    from simulations.compare.tables import few_columns
    from simulations.config import default_config
    from simulations.simulate import require_writable

    base = {**default_config(), **config_of(given)}
    named, baseline = contenders(parse_adapters(adapters), base)
    chosen = (0 if seeds == 1 else 1) if tune is None else tune
    protocol = Protocol(base, named, baseline, seeds, chosen, out)
    require_writable(out)
    try:
        outcome = run(protocol, console, at_once)
    except KeyboardInterrupt:
        line = f"stopped: what is finished in {out} is kept; go on with the same command"
        console.print(line, style="yellow", markup=False, soft_wrap=True)
        raise
    write_files(outcome, command_line(context))
    print_table("", outcome.comparison.rows, few_columns(outcome.comparison))
    for line in outcome.verdict:
        console.print(line, markup=False, highlight=False)
    if others := unreported(outcome.protocol):
        console.print(f"kept, not in the report: runs of {', '.join(others)}", markup=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
