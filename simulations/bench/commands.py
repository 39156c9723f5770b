"""`fedvb bench ...`: the benches by their options."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Measure on this machine what docs/ tells.")


class Part(StrEnum):
    """Parts of the bench of cohorts."""

    gpu = "gpu"
    cpu = "cpu"
    overhead = "overhead"
    scale = "scale"


@app.callback()
def bench() -> None:
    """Measure on this machine what docs/ tells."""


@app.command()
def cohort(
    part: Annotated[
        list[Part] | None,
        typer.Option(help="Steps on a gpu, a round on the cpu's cores, overhead, scale; all without."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers here.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, in turn; medians are shown.")] = 5,
) -> None:
    """Cohorts against one client at a time, PEFT and Ray; overhead and memory."""
    from simulations.bench.cohort import PARTS, run

    run(part or list(PARTS), json, repeats)


@app.command()
def step(
    shape: Annotated[
        list[str] | None, typer.Option(help="llama-2-7b, llama-2-13b or minilm; chosen by device without.")
    ] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="Texts x tokens of a step, such as 4x512.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers here.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, in turn; medians are shown.")] = 3,
) -> None:
    """A training step of one client against the frozen model and PEFT: milliseconds and memory."""
    from simulations.bench.step import run

    run(shape, tokens, json, repeats)


@app.command()
def wire(json: Annotated[Path | None, typer.Option(help="Write all numbers here.")] = None) -> None:
    """Bytes of messages at the shapes that people use, drawn from a recorded run."""
    from simulations.bench.wire import run

    run(json)


@app.command()
def poison(
    data: Annotated[str, typer.Option(help="docstrings, a file, a folder or a hub id.")] = "docstrings",
    model: Annotated[str, typer.Option(help="Base model: minilm, a local folder, a hub id.")] = "minilm",
    clients: Annotated[int, typer.Option(min=3, help="All of them train in every round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Of training.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Local steps of a round.")] = 10,
    factor: Annotated[
        list[float] | None, typer.Option(help="Of clip-updates; 0 is off. May be given again.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a text at most.")] = 64,
    eval_examples: Annotated[int, typer.Option(help="Held-out texts to score on.")] = 500,
    partition: Annotated[str, typer.Option(help="How texts are dealt.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
) -> None:
    """A task's score with one client that lies, and with its updates cut back."""
    from simulations.bench.poison import run
    from simulations.config import default_config

    given = {"data": data, "model": model, "clients": clients, "clients-per-round": clients, "rounds": rounds}
    given |= {"local-steps": steps, "max-length": max_length, "eval-examples": eval_examples}
    given |= {"partition": partition, "seed": seed, "eval-every": 1}
    run({**default_config(), **given}, factor or [0.0, 1.0, 1.5, 3.0])


@app.command()
def arrival(
    data: Annotated[str, typer.Option(help="A site's text: a file or a folder.")],
    model: Annotated[str, typer.Option(help="Base model: minilm, a local folder, a hub id.")] = "minilm",
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 5,
) -> None:
    """Seconds from a message's arrival at a new ClientApp to its answer, with a trainer and without."""
    from simulations.bench.arrival import run

    run(model, data, repeats)
