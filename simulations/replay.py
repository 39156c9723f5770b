"""Updates and states of any shape, drawn from what a real run sent.

`recorded.npz` holds rows of a run of MiniLM on SST-2 (the protocol of docs/results.md, lossless): how
selections and bank vectors changed in an update of round 1 ("first"), in updates of the last third of the
rounds ("steady"), and from one state to the next in that third ("down"). A replay draws whole rows from
it, with replacement, so it keeps what a size depends on: how many rows change, how, and how unevenly the bank
vectors of one message move. `python -m simulations.bench.wire --record` makes the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.gaps import nearest_gaps
from vblora.rounding import GRID, WireSettings, from_grid, round_state, round_update
from vblora.spec import Blueprint
from vblora.state import State, TopK, Update
from vblora.wire import encode_state, encode_update, initial

__all__ = ["PHASES", "Rows", "recorded", "replayed_reference", "replayed_update", "write_message"]

PHASES = ("first", "steady", "down")
Floats = NDArray[np.float32]
COARSE = 2.0**-14  # grid of a replayed reference: finer than any step that was sent
FAR = 20  # how many updates away from version 0 a replayed reference lies


@dataclass(frozen=True)
class Rows:
    """What was recorded of one phase.

    Attributes:
        base, chosen: (n, 2) places of a row before and after.
        base_gaps, gaps: (n,) gaps before and after.
        bank: (m, b) changes of bank vectors.
        head: (t,) changes of the head.
    """

    base: NDArray[np.int32]
    chosen: NDArray[np.int32]
    base_gaps: Floats
    gaps: Floats
    bank: Floats
    head: Floats


@cache
def recorded() -> Mapping[str, Rows]:
    """The recorded rows by phase."""
    content = resources.files("simulations").joinpath("recorded.npz").read_bytes()
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        return {
            phase: Rows(**{name: _widened(arrays[f"{phase}_{name}"]) for name in Rows.__dataclass_fields__})
            for phase in PHASES
        }


def replayed_reference(blueprint: Blueprint, phase: str, seed: int = 0) -> State:
    """A state as clients hold it in a phase; of "first" version 0 itself."""
    start = initial(blueprint)
    if phase == "first":
        return start
    rows, rng = recorded()[phase], np.random.default_rng((seed, 1))
    dense = {}
    for name, array in start.dense.items():
        moved = np.rint(FAR * _drawn(rows, name, array.shape, rng) / COARSE) * (COARSE / GRID)
        dense[name] = from_grid(array, moved.astype(np.int64))
    topk = start.topk
    if topk is not None:
        at = _row_numbers(rows, len(topk.positions), seed)
        gaps = nearest_gaps(rows.base_gaps[at, None])
        topk = TopK(_within(rows.base[at], blueprint), gaps)
    return State(20, dense, topk)


def replayed_update(blueprint: Blueprint, phase: str, seed: int = 0) -> tuple[State, Update]:
    """A reference and an exact update from it; of "down" the update is the way to the next state.

    The adapter is any; where it selects, it selects k = 2.
    """
    reference, rows = replayed_reference(blueprint, phase, seed), recorded()[phase]
    rng = np.random.default_rng((seed, 2))
    dense = {name: _drawn(rows, name, array.shape, rng) for name, array in reference.dense.items()}
    topk = reference.topk
    if topk is not None:
        at = _row_numbers(rows, len(topk.positions), seed)
        chosen, moved = _within(rows.chosen[at], blueprint), (rows.gaps - rows.base_gaps)[at, None]
        stayed = (chosen == topk.positions).all(axis=1, keepdims=True)
        gaps = np.where(stayed, np.maximum(topk.gaps + moved, 0), rows.gaps[at, None])
        topk = TopK(chosen, gaps.astype(np.float32))
    return reference, Update(reference.version, reference.digest, 320, dense, topk)


def write_message(
    blueprint: Blueprint, phase: str, reference: State, exact: Update, wire: WireSettings
) -> bytes:
    """Round a replayed update and write it as it is sent; of "down", the state that it leads to."""
    if phase == "down":
        dense = {name: array + exact.dense[name] for name, array in reference.dense.items()}
        wanted = State(reference.version + 1, dense, exact.topk)
        state, _ = round_state(wanted, reference, initial(blueprint), wire, {})
        return encode_state(state, blueprint, reference)
    rounded, _ = round_update(exact, reference, wire, {}, np.random.default_rng(0))
    return encode_update(rounded, blueprint, reference)


def _row_numbers(rows: Rows, count: int, seed: int) -> NDArray[np.int64]:
    """Which recorded row stands for each row of a replay: the same for a reference and its update."""
    return np.random.default_rng((seed, 0)).integers(len(rows.base), size=count)


def _drawn(rows: Rows, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Changes of a section: recorded vectors, cut or joined to the length of its rows."""
    length, count = rows.bank.shape[1], math.prod(shape)
    if name == "head":
        source = rows.head if len(rows.head) else rows.bank.reshape(-1)
        return source[rng.integers(len(source), size=shape)]
    lines, width = (shape[0], count // shape[0]) if len(shape) > 1 else (-(-count // length), length)
    pieces = -(-width // length)
    at = np.repeat(rng.integers(len(rows.bank), size=lines), pieces).reshape(lines, pieces)
    order = rng.permutation(length)
    drawn = rows.bank[at][:, :, order].reshape(lines, -1)[:, :width]
    return drawn.reshape(-1)[:count].reshape(shape).copy()


def _within(places: NDArray[np.int32], blueprint: Blueprint) -> NDArray[np.int32]:
    """Places of a bank that may be smaller than the recorded one; two of a row stay apart."""
    assert blueprint.topk_shape is not None
    h = blueprint.topk_shape[2]
    found = np.minimum(places, h - 1)
    tied = found[:, 0] == found[:, 1]
    found[tied, 1] = (found[tied, 1] + 1) % h
    return found


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
