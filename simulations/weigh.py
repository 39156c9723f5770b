"""Commands that weigh adapters: `fedvb plan` before anything is trained, `fedvb compare` by training them."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer
from rich.console import Console

from simulations.options import config_of, run_options
from vblora.errors import ConfigError

__all__ = ["add_commands"]

console = Console()


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(plan)


@run_options(("Adapter", "Wire"), without=("adapter",))
def plan(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A known model such as llama-2-13b, a config.json, a folder, or a hub id.")
    ] = "",
    adapters: Annotated[
        str, typer.Option(help="KIND or KIND:NUMBER, by comma; the number of lora is its rank.")
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

      fedvb plan --model llama-2-13b --adapters vblora:6,lora:64 --rounds 30
      fedvb plan --model ./llama/config.json --adapters vblora --link 5mbit
      fedvb plan --paper
    """
    from simulations.adapters import parse_adapters
    from simulations.plan import Federation, plan_adapters
    from simulations.plan_tables import as_json, paper_table, plan_table

    if paper:
        paper_table(console)
        return
    if not model:
        raise ConfigError("--model: which one? such as llama-2-13b, or a config.json")
    federation = Federation(clients, rounds, link)
    found = plan_adapters(model, classes, parse_adapters(adapters), config_of(given))
    if json:
        print(json_module.dumps(as_json(found, federation), indent=2))
    else:
        plan_table(console, found, federation)
