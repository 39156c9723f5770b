"""The command line, `fedvb`. Each command reads its options, calls one function, prints what came of it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console

from simulations import edge, operate, weigh
from simulations.bench.commands import app as bench_app
from simulations.options import config_of, run_options, typed
from vblora.errors import ConfigError, FedVBError

__all__ = ["app", "main"]

# Flower asks its servers for news and reports use unless told not to; a simulation talks to nobody.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RUNS = Path("runs")

app = typer.Typer(
    name="fedvb",
    help="Federated VB-LoRA: fine-tune one language model on the private text of many clients.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
operate.add_commands(app)
edge.add_commands(app)
weigh.add_commands(app)
console = Console(stderr=False)


class Format(StrEnum):
    """File formats of an exported adapter."""

    peft = "peft"
    lora = "lora"
    merged = "merged"


class Form(StrEnum):
    """How PEFT keeps VB-LoRA's logits."""

    full = "full"
    topk = "topk"


class Template(StrEnum):
    """Whether prompts go through the tokenizer's chat template."""

    auto = "auto"
    off = "off"


@app.callback(invoke_without_command=True)
def fedvb(context: typer.Context) -> None:
    """Federated VB-LoRA: fine-tune one language model on the private text of many clients."""
    if context.invoked_subcommand is None:
        context.get_help()  # prints it


@app.command()
@run_options()
def simulate(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default runs/NAME.", rich_help_panel="Run")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, stopped anyhow.", rich_help_panel="Run"),
    ] = False,
    **given: Any,
) -> None:
    """Simulate federated fine-tuning with N virtual clients on this machine.

    Every round some clients train the adapter on their own texts and send
    their top-k logits and their change of the bank; the server averages.
    Without options: MiniLM learns which Python library a docstring is from.

    Examples:

      fedvb simulate
      fedvb simulate --data reviews.csv --clients 20 --rounds 30 --partition iid
      fedvb simulate --adapter lora --rank 8 --out runs/lora
      fedvb simulate --resume --out runs/lora
    """
    from simulations.config import default_config
    from simulations.simulate import free_run_directory, resume_note, resumed_config

    if resume:
        if out is None:
            raise ConfigError("--resume: which run? name it with --out runs/NAME")
        config = resumed_config(out, typed(context))
        if note := resume_note(config):
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    else:
        config = default_config() | config_of(given)
        config["out"] = str(out or free_run_directory(RUNS, config))
    _run(config)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    format: Annotated[
        Format,
        typer.Option(
            help="peft: loads with PeftModel.from_pretrained; lora: the same as plain LoRA, for servers too; "
            "merged: a whole model, loads with from_pretrained."
        ),
    ] = Format.peft,
    form: Annotated[
        Form, typer.Option(help="VB-LoRA in PEFT: full logits (can train on), or topk (small, predicts).")
    ] = Form.full,
    client: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", help="Of this client, with the parts that it keeps for itself (--personal)."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Base model, where it lies elsewhere than the run's config says.")
    ] = "",
) -> None:
    """Write a run's adapter in a format that other tools load."""
    from simulations.export import export_run

    saved = export_run(run, out, format=format.value, form=form.value, model=model, client=client)
    whose = "" if client is None else f" of client {client}"
    console.print(f"{saved.what}{whose} of round {saved.version} -> {out}", markup=False, soft_wrap=True)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="To answer; else lines of --file.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A text a line; else standard input.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of a continuation, at most.")] = 64,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line, with the text and all of the answer.")
    ] = False,
    template: Annotated[
        Template,
        typer.Option(
            help="Prompts through the tokenizer's chat template: auto (as the run's --chat-template); off "
            "is what a run on plain text wants."
        ),
    ] = Template.auto,
    client: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", help="As this client, with what it keeps for itself (--personal)."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Base model, where it lies elsewhere than the run's config says.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the base: auto, own (the files'), float32, bfloat16, float16.")
    ] = "auto",
) -> None:
    """Answer texts from a trained run, a line each.

    Classification prints a label and its probability, language modelling
    what comes next. Examples:

      fedvb predict runs/NAME "two hours that fly by"
      fedvb predict runs/NAME < texts.txt > labels.tsv
    """
    from simulations.export import load_trained
    from simulations.predict import Answerer, lines

    found = load_trained(run, model, client)
    off = "off" in (template.value, found.config["chat-template"])
    answerer = Answerer(found, device, dtype, template=not off)
    for answer in answerer.answer(lines(texts or [], file), new_tokens):
        print(json.dumps(asdict(answer), ensure_ascii=False) if as_json else answer.line, flush=True)


@app.command()
def inspect(
    message: Annotated[
        Path, typer.Argument(help="A message, or a run or trainer's state: then the last one sent.")
    ],
) -> None:
    """Print what a client sent, section by section, with its bytes: all that leaves a site."""
    from simulations.inspect import contents, contents_table

    console.print(contents_table(contents(message)))


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option(help="Picture to write: png, svg or pdf.")],
) -> None:
    """Draw the scores of finished runs against rounds and against bytes, in one picture."""
    from fl_server.plot import plot_score

    plot_score(runs, out)
    console.print(f"plot: {out}", markup=False, soft_wrap=True)


def main() -> None:
    """Entry point. Bad input is one line on standard error and exit code 2; Ctrl-C is 130."""
    try:
        code = typer.main.get_command(app)(prog_name="fedvb", standalone_mode=False)
    except click.UsageError as error:
        _fail(error.format_message())
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except (FedVBError, OSError) as error:  # a full disk, a folder that cannot be written to
        _fail(str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _run(config: dict[str, Any]) -> None:
    from simulations.progress import Display
    from simulations.report import summary_table
    from simulations.simulate import prepare, simulate

    out = Path(str(config["out"]))
    with console.status("loading data and model"):
        site = prepare(config)
    _describe(site, config)
    with Display(console) as display:
        summary = simulate(config, display, display.on_step)
    console.print(summary_table(summary, out, display.measured()))


def _describe(site: Any, config: dict[str, Any]) -> None:
    """What is about to be trained, and the sizes that were chosen."""
    from simulations.report import facts

    for name, fact in {**facts(site, config), "run": config["out"]}.items():
        console.print(f"{name:<9}{fact}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _fail(message: str) -> None:
    line = " ".join(message.split())
    print(f"fedvb: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
