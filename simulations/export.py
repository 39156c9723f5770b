"""Write a run's adapter for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fl_client.base import find_model
from fl_client.memory import Memory
from fl_client.personal import with_part
from fl_server.checkpoint import load_newest, run_name
from simulations.config import load_config
from vblora.errors import RunError
from vblora.peft_files import export_peft
from vblora.state import State

__all__ = ["Exported", "client_state", "export_run"]


@dataclass(frozen=True)
class Exported:
    """What was written: the kind of adapter, and the round that it is of."""

    what: str
    version: int


def export_run(run: Path, out: Path, *, form: Literal["full", "topk"], client: int | None = None) -> Exported:
    """Write the newest state of a run, finished or not, in PEFT's format; with `client` as that one has it.

    Raises:
        RunError: no run there, nothing saved yet, or no such client.
        ExportError: PEFT cannot express the adapter.
    """
    config = load_config(run)
    newest = load_newest(run)
    if newest is None:
        raise RunError(f"{run}: no checkpoint yet; let the run finish a round first")
    state, blueprint = newest
    if client is not None:
        state = client_state(run, state, client)
    model = str(config["model"])
    export_peft(state, blueprint, out, base=find_model(model), form=form)
    return Exported(
        f"{blueprint.spec.kind} adapter ({form if blueprint.topk_shape else 'factors'})", state.version
    )


def client_state(run: Path, state: State, client: int) -> State:
    """A state of a run with the parts that one client keeps for itself; of one that has none yet, the state.

    Raises:
        RunError: the run keeps no parts, it has no such client, or what that one keeps is damaged.
    """
    config = load_config(run)
    if config["personal"] == "none":
        raise RunError(f"{run}: its clients keep nothing for themselves (personal is none); omit --client")
    if not 0 <= client < int(config["clients"]):
        raise RunError(f"{run}: client is {client}, expected 0 to {int(config['clients']) - 1}")
    memory = Memory(run / "clients")
    memory.open(run_name(run, state.version))
    return with_part(state, memory.personal(client, state.version))
