"""Write a run's adapter for other tools."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fl_client.base import Base, find_model, load_base, quiet
from fl_client.memory import Memory
from fl_client.personal import with_part
from fl_client.quantize import dequantized
from fl_server.checkpoint import load_newest, run_name
from simulations.config import load_config
from vblora.errors import ExportError, ModelError, RunError
from vblora.imports import hold_start
from vblora.merge import composed_rows, merge
from vblora.model import describe_base
from vblora.peft_files import export_lora, export_peft
from vblora.spec import Blueprint
from vblora.state import State

__all__ = ["Exported", "Trained", "client_state", "export_run", "load_trained", "require_same_base"]

Format = Literal["peft", "lora", "merged"]


@dataclass(frozen=True)
class Exported:
    """What was written: the kind of adapter, and the round that it is of."""

    what: str
    version: int


@dataclass(frozen=True)
class Trained:
    """What a run has come to: its newest state, what that means, its config, the name of its base."""

    state: State
    blueprint: Blueprint
    config: dict[str, Any]
    model: str


def load_trained(run: Path, model: str = "", client: int | None = None) -> Trained:
    """The newest state of a run, finished or not.

    Args:
        run: its directory.
        model: of the base, where it lies elsewhere than the run's config says.
        client: whose own parts to take with it.

    Raises:
        RunError: no run there, nothing saved yet, or no such client.
        StartError: the adapter that it went on from is gone.
    """
    config = load_config(run)
    newest = load_newest(run)
    if newest is None:
        raise RunError(f"{run}: no checkpoint yet; let the run finish a round first")
    state, blueprint = newest
    if client is not None:
        state = client_state(run, state, client)
    return Trained(state, hold_start(blueprint, str(config["start"])), config, model or str(config["model"]))


def export_run(
    run: Path,
    out: Path,
    *,
    format: Format = "peft",
    form: Literal["full", "topk"] = "full",
    model: str = "",
    client: int | None = None,
) -> Exported:
    """Write the newest state of a run.

    Args:
        run: its directory.
        out: folder to write; nothing stands there yet, or an earlier export.
        format: "peft", the kind that PEFT knows the adapter by; "lora", plain factors; "merged", a whole
            model with tokenizer and labels.
        form: of adapters with a bank in PEFT's format: "full" dense logits, or "topk".
        model: of the base, where it lies elsewhere than the run's config says.
        client: whose own parts to take with it.

    Raises:
        RunError: no run there, nothing saved yet, or no such client.
        ExportError: the format cannot express the adapter.
        ModelError: the base is missing or another than the adapter was trained on.
    """
    found = load_trained(run, model, client)
    state, blueprint = found.state, found.blueprint
    what = f"{blueprint.spec.kind} adapter"
    if format == "merged":
        _export_merged(found, out)
        return Exported(f"{what}, merged into {found.model},", state.version)
    base = find_model(found.model)
    if format == "lora":
        dense = _load(found).model if blueprint.spec.kind == "lora-xs" else None
        rows = composed_rows(state, blueprint, dense).numpy()
        export_lora(rows, state, blueprint, out, base=base)
        return Exported(f"{what} (as LoRA)", state.version)
    export_peft(state, blueprint, out, base=base, form=form)
    return Exported(f"{what} ({form if hasattr(blueprint.spec, 'topk') else 'factors'})", state.version)


def _export_merged(found: Trained, out: Path) -> None:
    blueprint = found.blueprint
    loaded = _load(found)
    model: Any = loaded.model
    merge(model, found.state, blueprint)
    if blueprint.labels:
        model.config.id2label = dict(enumerate(blueprint.labels))
        model.config.label2id = {label: number for number, label in enumerate(blueprint.labels)}
    model.config.fedvb = {
        "format": "fedvb-merged-1",
        "adapter": blueprint.fingerprint.hex(),
        "round": found.state.version,
    }
    with _whole_folder(out) as folder, quiet():
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def _load(found: Trained) -> Base:
    """The base as the adapter was trained on it, with dense layers."""
    loaded = load_base(
        found.model,
        found.blueprint.labels,
        torch.device("cpu"),
        dtype="own",
        quantize=str(found.config["quantize"]),
        seed=int(found.config["seed"]),
    )
    require_same_base(loaded.model, found)
    with quiet():
        return replace(loaded, model=dequantized(loaded.model))


def require_same_base(base: torch.nn.Module, found: Trained) -> None:
    """See that a base is of the kind that an adapter was trained on.

    Raises:
        ModelError: it has another architecture or other sizes.
    """
    if (kind := describe_base(base)) != found.blueprint.model:
        raise ModelError(
            f"--model: {found.model} is {kind}, expected {found.blueprint.model}, on which the adapter was "
            "trained; name that base with --model"
        )


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder that appears as `out` when all is written, or not at all.

    Raises:
        ExportError: something is there already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out: {out} is not empty, expected a folder that is new or empty")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
