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
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, in turn; medians are shown.")] = 5,
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
def arrival(
    data: Annotated[str, typer.Option(help="A site's text: a file or a folder.")],
    model: Annotated[str, typer.Option(help="Base model: minilm, a local folder, a hub id.")] = "minilm",
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 5,
) -> None:
    """Seconds from a message's arrival at a new ClientApp to its answer, with a trainer and without."""
    from simulations.bench.arrival import run

    run(model, data, repeats)
