"""Write a run's adapter for other tools."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
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
from vblora.peft_files import PEFT_FILES, export_lora, export_peft
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
    """What a run has come to: its newest state, what that means, its config, the name of its base.

    `headless` where clients keep their heads and none was named: the state's is as the seed drew it.
    """

    state: State
    blueprint: Blueprint
    config: dict[str, Any]
    model: str
    headless: bool = False

    def require_head(self) -> None:
        """See that there is a head that somebody trained.

        Raises:
            RunError: clients keep theirs, and none was named.
        """
        if self.headless:
            run, personal, clients = (self.config[name] for name in ("out", "personal", "clients"))
            raise RunError(
                f"{run}: its clients keep their heads (personal is {personal}); choose one with --client, "
                f"0 to {int(clients) - 1}"
            )


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
    headless = client is None and "head" in str(config["personal"])
    blueprint = hold_start(blueprint, str(config["start"]))
    return Trained(state, blueprint, config, model or str(config["model"]), headless)


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
        out: folder to write, new or empty; an earlier export of an adapter gives way to another.
        format: "peft", the kind that PEFT knows the adapter by; "lora", plain factors; "merged", a whole
            model with tokenizer and labels.
        form: of adapters with a bank in PEFT's format: "full" dense logits, or "topk".
        model: of the base, where it lies elsewhere than the run's config says.
        client: whose own parts to take with it.

    Raises:
        RunError: no run there, nothing saved yet, no such client, or a whole model without a trained head.
        ExportError: the format cannot express the adapter, or something else is in the folder.
        ModelError: the base is missing or another than the adapter was trained on.
    """
    found = load_trained(run, model, client)
    blueprint = found.blueprint
    if format == "merged":
        found.require_head()
        with _whole_folder(out) as folder:
            _write_merged(found, folder)
        how = f", merged into {found.model},"
    else:
        with _whole_folder(out, PEFT_FILES) as folder:
            _write_adapter(found, folder, as_lora=format == "lora", form=form)
        kept = form if hasattr(blueprint.spec, "topk") else "factors"
        how = " (as LoRA)" if format == "lora" else f" ({kept})"
        how += " with the seed's head" * found.headless
    return Exported(f"{blueprint.spec.kind} adapter{how}", found.state.version)


def _write_adapter(found: Trained, folder: Path, *, as_lora: bool, form: Literal["full", "topk"]) -> None:
    state, blueprint, base = found.state, found.blueprint, find_model(found.model)
    if as_lora:
        dense = _load(found).model if blueprint.spec.kind == "lora-xs" else None
        rows = composed_rows(state, blueprint, dense).numpy()
        export_lora(rows, state, blueprint, folder, base=base)
    else:
        export_peft(state, blueprint, folder, base=base, form=form)


def _write_merged(found: Trained, folder: Path) -> None:
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
    with quiet():
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
def _whole_folder(out: Path, earlier: Collection[str] = ()) -> Iterator[Path]:
    """A folder that appears as `out` when all is written, or not at all.

    Args:
        out: what is there is kept where writing fails.
        earlier: names of files that may be there, and give way.

    Raises:
        ExportError: something else is there already.
    """
    place = out.resolve()  # not a link to it
    if place.exists() and not place.is_dir():
        raise ExportError(f"--out: {out} is a file, expected a folder")
    there = sorted(path.name for path in place.iterdir()) if place.exists() else []
    if others := [name for name in there if name not in earlier]:
        allowed = ", or that holds an earlier export of an adapter" if earlier else ""
        raise ExportError(f"--out: {out} holds {others[0]}, expected a folder that is new or empty{allowed}")
    place.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{place.name}."
    with TemporaryDirectory(dir=place.parent, prefix=prefix, ignore_cleanup_errors=True) as beside:
        folder, gone = Path(beside, "new"), Path(beside, "earlier")
        folder.mkdir()
        yield folder
        try:
            if there:  # a folder does not replace one that holds something
                place.replace(gone)
            folder.replace(place)
        except BaseException:
            if gone.exists():
                gone.replace(place)
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
