"""Write a run's adapter for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fl_client.base import find_model
from fl_server.checkpoint import load_newest
from simulations.config import load_config
from vblora.errors import RunError
from vblora.peft_files import export_peft

__all__ = ["Exported", "export_run"]


@dataclass(frozen=True)
class Exported:
    """What was written: the kind of adapter, and the round that it is of."""

    what: str
    version: int


def export_run(run: Path, out: Path, *, form: Literal["full", "topk"]) -> Exported:
    """Write the newest state of a run, finished or not, in PEFT's format.

    Raises:
        RunError: no run there, or nothing saved yet.
        ExportError: PEFT cannot express the adapter.
    """
    config = load_config(run)
    newest = load_newest(run)
    if newest is None:
        raise RunError(f"{run}: no checkpoint yet; let the run finish a round first")
    state, blueprint = newest
    model = str(config["model"])
    export_peft(state, blueprint, out, base=find_model(model), form=form)
    return Exported(
        f"{blueprint.spec.kind} adapter ({form if blueprint.topk_shape else 'factors'})", state.version
    )
