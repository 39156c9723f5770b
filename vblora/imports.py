"""Adapters that a run can go on from: a folder that PEFT saved (`vblora.peft_import`), or a run of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vblora.errors import RunError, StartError
from vblora.files import load_state
from vblora.peft_import import read_peft
from vblora.spec import Blueprint
from vblora.start import ChosenFirst, Content, Found, Order, SeededOrder, chosen_vectors, order_of

__all__ = ["hold_start", "read_start"]


def read_start(folder: Path, seed: int) -> Found:
    """Read an adapter that PEFT saved, or that a run of ours left.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, or a run directory.
        seed: of what a PEFT adapter does not say; a run's own is kept.

    Raises:
        StartError: there is none, it is damaged, or it has parts that cannot be trained here.
    """
    if (folder / "adapter_config.json").is_file():
        return read_peft(folder, seed)
    for path in (folder / "adapter" / "adapter.safetensors", folder / "adapter.safetensors"):
        if path.is_file():
            return _read_ours(folder, path)
    raise StartError(
        f"start {folder}: no adapter there; expected a folder with adapter_config.json and "
        "adapter_model.safetensors, or a finished run"
    )


def hold_start(blueprint: Blueprint, folder: str) -> Blueprint:
    """`blueprint` with the content of its start, of which it may know the name alone.

    Args:
        blueprint: one that starts from the seed is given back.
        folder: of the adapter that it goes on from.

    Raises:
        StartError: the folder holds another adapter, or none.
    """
    asked = blueprint.start
    if asked is None or asked.content is not None:
        return blueprint
    held = read_start(Path(folder), blueprint.spec.seed).started(replace(blueprint, start=None))
    if held != blueprint:
        assert held.start is not None
        raise StartError(
            f"start {folder}: it holds adapter {held.start.digest[:12]}, expected {asked.digest[:12]}; "
            "give it the files that the run was started with"
        )
    return held


def _read_ours(folder: Path, path: Path) -> Found:
    try:
        state, old = load_state(path)
    except RunError as error:
        raise StartError(f"start {folder}: {error}") from error
    if old.start is not None:
        raise StartError(
            f"start {folder}: that run went on from another adapter itself; "
            "export it (fedvb export --format peft) and go on from the export"
        )

    def read(blueprint: Blueprint) -> Content:
        for what in ("linears", "head", "labels"):
            if getattr(old, what) != getattr(blueprint, what):
                raise StartError(
                    f"start {folder}: its {what} are {getattr(old, what)!r:.80}, "
                    f"expected {getattr(blueprint, what)!r:.80}"
                )
        if state.topk is None:
            order: Order | None = order_of(old) if old.spec.kind == "bank-only" else None
            return Content(state.dense, order)
        seeds = order_of(old)
        assert isinstance(seeds, SeededOrder)
        return Content(
            state.dense, ChosenFirst(seeds, chosen_vectors(seeds, state.topk.positions)), state.topk.gaps
        )

    return Found(str(folder), old.spec, frozenset(linear.name for linear in old.linears), read)
