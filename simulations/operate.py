"""Commands for those who run a site or a server: `fedvb trainer`, `keys`, `status`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vblora.errors import ConfigError

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(trainer)


def trainer(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Base model: a local folder, a hub id, or minilm.")],
    data: Annotated[
        str,
        typer.Option(help="This site's text: a csv/tsv/json/jsonl/parquet/txt file, or a folder of them."),
    ],
    state: Annotated[Path, typer.Option(help="Folder for what must outlive a restart; of one trainer.")],
    socket: Annotated[
        Path | None, typer.Option(help="Unix socket to answer on; else trainer.sock in --state.")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="All classes by comma, the same at every site; else the run's, or the data's.")
    ] = "",
    task: Annotated[str, typer.Option(help="classification, causal-lm, or auto.")] = "auto",
    text_column: Annotated[str, typer.Option(help="Column of the text, if not a usual name.")] = "",
    label_column: Annotated[str, typer.Option(help="Column of the label, if not a usual name.")] = "",
    eval_split: Annotated[str, typer.Option(help="Held-out files to score on: dev, test, dev+test.")] = "",
    max_examples: Annotated[int, typer.Option(help="Training texts at most; 0 is all.")] = 0,
    eval_examples: Annotated[int, typer.Option(help="Held-out texts at most; 0 is all.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of a text at most, as in the run.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Keep model and data loaded at a site, and train when its SuperNode is asked to.

    Texts never leave this process: what it answers are counts, sums of
    losses, and updates. Give the SuperNode the socket:

      flower-supernode ... --node-config 'socket="DIR/trainer.sock" name="clinic-a"'
    """
    from fl_client.trainer import run_trainer

    if data == "docstrings":
        raise ConfigError("--data docstrings: a site trains on its own text; expected a file or a folder")
    log_lines()
    own: dict[str, Any] = {
        name.replace("_", "-"): value
        for name, value in context.params.items()
        if name not in ("state", "socket", "max_length") and value not in ("", "auto", 0)
    }
    run_trainer(own, state, socket, {"max-length": max_length})


def log_lines() -> None:
    """Log to standard error, a line an event: what journald and a terminal both want."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger("fedvb").setLevel(logging.INFO)
