"""The command line, `fedvb`. Each command reads its options, calls one function, prints what came of it."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from click.core import ParameterSource
from rich.console import Console

from simulations.bench.commands import app as bench_app
from simulations.operate import add_commands
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
add_commands(app)
console = Console(stderr=False)


class Format(StrEnum):
    """File formats of an exported adapter."""

    peft = "peft"


class Form(StrEnum):
    """How PEFT keeps VB-LoRA's logits."""

    full = "full"
    topk = "topk"


@app.callback(invoke_without_command=True)
def fedvb(context: typer.Context) -> None:
    """Federated VB-LoRA: fine-tune one language model on the private text of many clients."""
    if context.invoked_subcommand is None:
        context.get_help()  # prints it


@app.command()
def simulate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="Base model: minilm (the demo's), a hub id, or a local folder.", rich_help_panel="Data"
        ),
    ] = "minilm",
    data: Annotated[
        str,
        typer.Option(
            help="docstrings (text of this machine's Python libraries), a csv/tsv/json/jsonl/parquet file, "
            "a folder with train/dev/test files, or a hub data set id.",
            rich_help_panel="Data",
        ),
    ] = "docstrings",
    task: Annotated[
        str,
        typer.Option(
            help="classification, causal-lm, or auto: what the columns suggest.", rich_help_panel="Data"
        ),
    ] = "auto",
    text_column: Annotated[
        str, typer.Option(help="Column of the text, if not a usual name.", rich_help_panel="Data")
    ] = "",
    label_column: Annotated[
        str, typer.Option(help="Column of the label, if not a usual name.", rich_help_panel="Data")
    ] = "",
    labels: Annotated[
        str,
        typer.Option(help="All classes by comma, where the data lacks some.", rich_help_panel="Data"),
    ] = "",
    eval_split: Annotated[
        str, typer.Option(help="Held-out files to score on: dev, test, dev+test.", rich_help_panel="Data")
    ] = "",
    max_examples: Annotated[
        int,
        typer.Option(help="Training texts at most; 0 is all, or 4,000 docstrings.", rich_help_panel="Data"),
    ] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of a text at most.", rich_help_panel="Data")] = 128,
    partition: Annotated[
        str,
        typer.Option(
            help="How texts are dealt: iid, dirichlet:ALPHA (less is more skewed), by:COLUMN; "
            "auto is dirichlet:0.5 where there are labels, else iid.",
            rich_help_panel="Data",
        ),
    ] = "auto",
    clients: Annotated[int, typer.Option(help="Virtual clients.", rich_help_panel="Federation")] = 10,
    clients_per_round: Annotated[
        int, typer.Option(help="Drawn each round.", rich_help_panel="Federation")
    ] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds of training.", rich_help_panel="Federation")] = 10,
    eval_every: Annotated[
        int, typer.Option(help="Rounds between evaluations.", rich_help_panel="Federation")
    ] = 1,
    eval_examples: Annotated[
        int, typer.Option(help="Held-out texts to score on at most; 0 is all.", rich_help_panel="Federation")
    ] = 0,
    dropout: Annotated[
        float, typer.Option(help="Chance that a drawn client never answers.", rich_help_panel="Federation")
    ] = 0.0,
    stragglers: Annotated[
        float, typer.Option(help="Chance that one is stopped early.", rich_help_panel="Federation")
    ] = 0.0,
    adapter: Annotated[
        str,
        typer.Option(
            help="vblora, lora, ffa-lora, lora-xs, uni-lora or bank-only.", rich_help_panel="Adapter"
        ),
    ] = "vblora",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="INTEGER",
            help="r; else 4, 8 (lora, ffa-lora) or 16 (lora-xs).",
            rich_help_panel="Adapter",
        ),
    ] = None,
    num_vectors: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="INTEGER",
            help="h, vectors in the bank; else by model size.",
            rich_help_panel="Adapter",
        ),
    ] = None,
    vector_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="INTEGER",
            help="b, length of a vector; else one that divides.",
            rich_help_panel="Adapter",
        ),
    ] = None,
    topk: Annotated[int, typer.Option(help="k, vectors mixed into a row.", rich_help_panel="Adapter")] = 2,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or layer names such as query,value.", rich_help_panel="Adapter")
    ] = "all-linear",
    alpha: Annotated[
        float, typer.Option(help="Of lora and ffa-lora; 0 is twice the rank.", rich_help_panel="Adapter")
    ] = 0.0,
    theta_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="INTEGER",
            help="d, numbers that uni-lora trains; else by model size.",
            rich_help_panel="Adapter",
        ),
    ] = None,
    local_steps: Annotated[
        int, typer.Option(help="Steps of a client in a round.", rich_help_panel="Training")
    ] = 10,
    batch_size: Annotated[int, typer.Option(help="Texts a step.", rich_help_panel="Training")] = 16,
    lr_bank: Annotated[
        float, typer.Option(help="Learning rate of the bank.", rich_help_panel="Training")
    ] = 8e-3,
    lr_logits: Annotated[
        float, typer.Option(help="Learning rate of the logits.", rich_help_panel="Training")
    ] = 1e-2,
    lr_rows: Annotated[
        float,
        typer.Option(
            help="Learning rate of the kinds without a bank; 0 is the kind's own.", rich_help_panel="Training"
        ),
    ] = 0.0,
    lr_head: Annotated[
        float, typer.Option(help="Learning rate of the head.", rich_help_panel="Training")
    ] = 1e-2,
    warmup: Annotated[
        float, typer.Option(help="Share of a client's steps to warm up over.", rich_help_panel="Training")
    ] = 0.25,
    clip_norm: Annotated[
        float, typer.Option(help="Largest gradient norm; 0 is off.", rich_help_panel="Training")
    ] = 0.0,
    prox: Annotated[
        float,
        typer.Option(help="FedProx: pull of a client to the shared state.", rich_help_panel="Training"),
    ] = 0.0,
    logits_every: Annotated[
        int,
        typer.Option(
            help="Rounds from one that trains logits to the next; others train the bank.",
            rich_help_panel="Training",
        ),
    ] = 1,
    logit_mean: Annotated[
        str,
        typer.Option(
            help="What is averaged of the selections: mixture weights, or logits.", rich_help_panel="Training"
        ),
    ] = "weights",
    server_optimizer: Annotated[
        str,
        typer.Option(
            help="What the server makes of a round's mean change: mean, momentum or adam.",
            rich_help_panel="Training",
        ),
    ] = "mean",
    server_rate: Annotated[
        float, typer.Option(help="Scale of the server's step.", rich_help_panel="Training")
    ] = 1.0,
    server_decay: Annotated[
        float,
        typer.Option(help="Of what it remembers of earlier rounds.", rich_help_panel="Training"),
    ] = 0.9,
    clip_updates: Annotated[
        float,
        typer.Option(
            help="Times the round's median that an update may reach; 0 is off.", rich_help_panel="Training"
        ),
    ] = 0.0,
    schedule: Annotated[
        str, typer.Option(help="Rates over rounds: cosine, root or constant.", rich_help_panel="Training")
    ] = "cosine",
    warmup_rounds: Annotated[int, typer.Option(help="Rounds of warm-up.", rich_help_panel="Training")] = 0,
    wire: Annotated[
        str,
        typer.Option(
            help="How messages are rounded: lossless, default or smallest; the options below replace parts, "
            "and 0 or auto leaves a part as it is.",
            rich_help_panel="Wire",
        ),
    ] = "default",
    wire_up_bits: Annotated[
        float,
        typer.Option(
            help="Bits of a number going up: 0.5 to 12, 16 (bfloat16), 32 (float32).", rich_help_panel="Wire"
        ),
    ] = 0.0,
    wire_head_bits: Annotated[
        float, typer.Option(help="The same, of the task head.", rich_help_panel="Wire")
    ] = 0.0,
    wire_down_bits: Annotated[
        float,
        typer.Option(help="Bits of a number's change going down: 0.5 to 12, or 32.", rich_help_panel="Wire"),
    ] = 0.0,
    wire_keep: Annotated[
        float, typer.Option(help="Share of the largest numbers that go up.", rich_help_panel="Wire")
    ] = 0.0,
    wire_feedback: Annotated[
        str,
        typer.Option(
            help="Clients add what rounding dropped to their next update: on, off, auto.",
            rich_help_panel="Wire",
        ),
    ] = "auto",
    wire_stochastic: Annotated[
        str,
        typer.Option(help="Clients round up or down by chance: on, off, auto.", rich_help_panel="Wire"),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.", rich_help_panel="Run")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Run")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the base: auto, float32, bfloat16, float16.", rich_help_panel="Run")
    ] = "auto",
    cohort: Annotated[
        int, typer.Option(help="Clients trained in one forward; 0 chooses.", rich_help_panel="Run")
    ] = 0,
    workers: Annotated[
        int, typer.Option(min=0, metavar="INTEGER", help="Processes; 0 is one a GPU.", rich_help_panel="Run")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default runs/NAME.", rich_help_panel="Run")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, stopped anyhow.", rich_help_panel="Run"),
    ] = False,
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

    given = {name.replace("_", "-"): value for name, value in context.params.items() if value is not None}
    if resume:
        if out is None:
            raise ConfigError("--resume: which run? name it with --out runs/NAME")
        config = resumed_config(out, _on_command_line(context))
        if note := resume_note(config):
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    else:
        config = default_config() | given | {"resume": False}
        config["out"] = str(out or free_run_directory(RUNS, config))
    _run(config)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    format: Annotated[Format, typer.Option(help="peft: loads with PeftModel.from_pretrained.")] = Format.peft,
    form: Annotated[
        Form, typer.Option(help="VB-LoRA in PEFT: full logits (can train on), or topk (small, predicts).")
    ] = Form.full,
) -> None:
    """Write a run's adapter in a format that other tools load."""
    from simulations.export import export_run

    saved = export_run(run, out, form=form.value)
    console.print(f"{saved.what} of round {saved.version} -> {out}", markup=False, soft_wrap=True)


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
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
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
    blueprint, spec = site.blueprint, site.blueprint.spec
    least, most = min(map(len, site.parts)), max(map(len, site.parts))
    letters = {"num_vectors": "h", "vector_length": "b", "topk": "k", "theta_length": "d"}
    given = {letter: getattr(spec, name, None) for name, letter in letters.items()}
    sizes = ", ".join([f"rank {spec.rank}", *(f"{name} {size}" for name, size in given.items() if size)])
    facts = {
        "model": f"{config['model']} on {site.model.device}",
        "data": f"{config['data']}: {len(site.train):,} training texts, {len(site.test):,} held out"
        + (f", {len(blueprint.labels)} labels" if blueprint.labels else ""),
        "clients": f"{len(site.parts)}, with {least:,} to {most:,} texts each; "
        f"{config['clients-per-round']} a round",
        "adapter": f"{spec.kind}, {sizes}: {blueprint.rows:,} rows in {len(blueprint.linears)} layers",
        "numbers": f"{blueprint.trained_parameters:,} trained, {blueprint.stored_parameters:,} sent "
        f"({blueprint.head_size:,} of them the head)",
        "run": config["out"],
    }
    for name, fact in facts.items():
        console.print(f"{name:<9}{fact}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _on_command_line(context: typer.Context) -> dict[str, Any]:
    """The options that were typed, by config key."""
    return {
        name.replace("_", "-"): value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def _fail(message: str) -> None:
    line = " ".join(message.split())
    print(f"fedvb: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
