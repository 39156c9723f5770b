"""What is given up so that a message becomes small, and who remembers it.

An update is rounded to steps that its sender chooses by the bits they cost, not by its largest number. A
state is rounded to a fixed grid around the values of version 0, so that the difference of any two states is a
few whole numbers, and adding them gives the same bits everywhere. What rounding drops stays with whoever
rounded, and is added to what he sends next (error feedback, arXiv 1901.09847). Gaps of logits are rounded up
or down by chance, so that means over clients and rounds come out right without any memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import LARGEST, entropy_bits
from vblora.errors import ConfigError, raise_faults
from vblora.selection import GAP_STEP, LARGEST_GAP, gap_codes
from vblora.state import State, TopK, Update

__all__ = [
    "GRID",
    "WIRES",
    "Dense",
    "WireSettings",
    "from_grid",
    "on_grid",
    "round_state",
    "round_update",
    "wire_keys",
    "wire_settings",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Dense = Mapping[str, Floats]

GRID = 2.0**-20  # of a state, around version 0; a float32 below 16 tells its neighbours apart
SAMPLE = 1 << 14  # numbers that a step is chosen by
SEARCH = 12  # halvings of the interval in which the step is sought
TAIL = 1 << 14  # steps beyond which numbers count as one while it is sought
FLOAT32, BFLOAT16 = 32.0, 16.0
SWITCH = ("on", "off", "auto")
MOST_STEPS = 1 << 23  # of an update: whole in float32


@dataclass(frozen=True)
class WireSettings:
    """How messages are rounded. A preset of `WIRES`, or parts of one replaced.

    Attributes:
        up_bits: of a number of the bank's (or the rows') change in an update; 32 is float32, 16 bfloat16,
            less is a mean over entropy-coded steps.
        head_bits: the same, of the head's change.
        down_bits: of a number's change from one state to the next; 32 sends whole float32 states.
        keep: share of an update's largest numbers that are sent; the others wait in the error feedback.
        feedback: clients add what rounding dropped to their next update.
        stochastic: clients round their change up or down by chance instead of to the nearest step.
    """

    up_bits: float = 32.0
    head_bits: float = 32.0
    down_bits: float = 32.0
    keep: float = 1.0
    feedback: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        raise_faults("wire", self._faults())

    def _faults(self) -> Iterator[str]:
        for name in ("up_bits", "head_bits"):
            bits = getattr(self, name)
            if not (0.5 <= bits <= 12 or bits in (BFLOAT16, FLOAT32)):
                yield f"{name.replace('_', '-')} is {bits:g}, expected 0.5 to 12, 16 or 32 (bf16, float32)"
        if not (0.5 <= self.down_bits <= 12 or self.down_bits == FLOAT32):
            yield f"down-bits is {self.down_bits:g}, expected 0.5 to 12, or 32 (float32)"
        if not 0 < self.keep <= 1:
            yield f"keep is {self.keep:g}, expected above 0, at most 1"
        elif self.keep < 1 and max(self.up_bits, self.head_bits) > 12:
            yield f"keep is {self.keep:g}: it saves bytes only with up-bits and head-bits of 12 or less"

    @property
    def lossless(self) -> bool:
        """Whether updates travel as they are, selections included."""
        return self.up_bits == self.head_bits == FLOAT32 and self.keep == 1

    def bits(self, section: str) -> float:
        """Bits of a number of an update's section."""
        return self.head_bits if section == "head" else self.up_bits


WIRES: Mapping[str, WireSettings] = {
    "lossless": WireSettings(),
    "default": WireSettings(up_bits=3.0, head_bits=5.0, down_bits=4.0),
    "smallest": WireSettings(up_bits=1.5, head_bits=3.0, down_bits=3.0),
}


def wire_keys() -> dict[str, str | float]:
    """The keys that `wire_settings` reads, with values that leave all to the default preset."""
    parts = {f"wire-{entry.name.replace('_', '-')}": entry.default for entry in fields(WireSettings)}
    return {"wire": "default", **{key: "auto" if isinstance(d, bool) else 0.0 for key, d in parts.items()}}


def wire_settings(config: Mapping[str, object]) -> WireSettings:
    """Read the keys `wire` (a preset) and `wire-up-bits`, ... (parts; 0 or auto is the preset's) of a config.

    Raises:
        ConfigError: every key that is wrong.
    """
    keys = {**wire_keys(), **{key: value for key, value in config.items() if key.startswith("wire")}}
    preset = keys["wire"]
    if preset not in WIRES:
        raise ConfigError(f"wire is {preset!r}, expected one of {', '.join(WIRES)}")
    given: dict[str, Any] = {}
    faults = []
    for entry in fields(WireSettings):
        key = f"wire-{entry.name.replace('_', '-')}"
        part = keys[key]
        if isinstance(entry.default, bool):
            if part not in SWITCH:
                faults.append(f"{key} is {part!r}, expected on, off or auto")
            elif part != "auto":
                given[entry.name] = part == "on"
        elif isinstance(part, bool) or not isinstance(part, int | float):
            faults.append(f"{key} is {part!r}, expected a number")
        elif part:
            given[entry.name] = float(part)
    raise_faults("options", faults)
    return replace(WIRES[str(preset)], **given)


def round_update(
    update: Update, reference: State, settings: WireSettings, waiting: Dense, noise: np.random.Generator
) -> tuple[Update, Dense]:
    """An update as it will be read, and what was dropped from it.

    Args:
        update: exact.
        reference: what it was trained from.
        settings: a lossless wire gives the update back.
        waiting: what the last rounding dropped, by section; may lack any.
        noise: of the stochastic roundings.

    Returns:
        The rounded update, `steps` filled in, and what waits now, float32 by section.
    """
    if settings.lossless:
        return update, {}
    dense: dict[str, Floats] = {}
    left: dict[str, Floats] = {}
    steps: dict[str, float] = {}
    for name, change in update.dense.items():
        wanted = change + waiting[name] if settings.feedback and name in waiting else change
        dense[name], steps[name] = _rounded(wanted, settings, settings.bits(name), noise)
        if settings.feedback and np.isfinite(wanted).all():
            left[name] = wanted - dense[name]
    topk = update.topk
    if topk is not None and reference.topk is not None:
        topk = _round_gaps(topk, reference.topk, noise)
    return replace(update, dense=dense, topk=topk, steps=steps), left


def round_state(
    exact: State, reference: State, initial: State, settings: WireSettings, waiting: Dense
) -> tuple[State, Dense]:
    """The next reference: on the grid, a few bits away from the last one.

    Args:
        exact: the mean of a round.
        reference: what clients hold.
        initial: version 0 of the same blueprint.
        settings: `down_bits`.
        waiting: what the last rounding dropped, by section; may lack any.

    Returns:
        The state, and what waits now.
    """
    if settings.down_bits == FLOAT32:
        return exact, {}
    dense: dict[str, Floats] = {}
    left: dict[str, Floats] = {}
    for name, array in exact.dense.items():
        start, old = initial.dense[name], reference.dense[name]
        if array is old or np.array_equal(array.view(np.uint32), old.view(np.uint32)):
            dense[name] = old  # nobody trained it: what waits goes on waiting
            left |= {name: waiting[name]} if name in waiting else {}
            continue
        wanted = array + waiting[name] if name in waiting else array
        held = on_grid(old, start)
        if held is None or not float(np.abs(wanted).max(initial=0.0)) < 8:
            dense[name] = array  # sent whole
            continue
        change = (wanted.astype(np.float64) - old) / GRID
        coarse = _power_of_two(_step(change, settings.down_bits))
        dense[name] = from_grid(start, held + (np.rint(change / coarse) * coarse).astype(np.int64))
        left[name] = wanted - dense[name]
    topk = exact.topk
    if topk is not None and reference.topk is not None:
        topk = _round_gaps(topk, reference.topk, np.random.default_rng(exact.version))
    return State(exact.version, dense, topk), left


def from_grid(initial: Floats, steps: Ints) -> Floats:
    """`initial` plus whole steps of the grid. Exact in float64, rounded once: the same bits everywhere."""
    return (initial.astype(np.float64) + steps * GRID).astype(np.float32)


def on_grid(values: Floats, initial: Floats) -> Ints | None:
    """The steps from `initial` to `values`, or None where there are values off the grid."""
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint((values.astype(np.float64) - initial) / GRID)
    if not (np.abs(steps) <= LARGEST).all():
        return None
    whole = steps.astype(np.int64)
    return whole if np.array_equal(from_grid(initial, whole), values) else None


def _rounded(
    change: Floats, settings: WireSettings, bits: float, noise: np.random.Generator
) -> tuple[Floats, float]:
    """A change on steps, and the step; 0 where it is not on steps."""
    if not np.isfinite(change).all():
        return change, 0.0  # training has diverged: the receiver shall see it
    wanted = change
    if settings.keep < 1 and change.size:
        size = np.abs(change)
        wanted = np.where(size >= np.quantile(size, 1 - settings.keep), change, np.float32(0))
    if bits == FLOAT32:
        return wanted, 0.0
    if bits == BFLOAT16:
        return _bfloat16(wanted), 0.0
    step = np.float32(_step(wanted, bits))
    whole = wanted / step
    whole = np.floor(whole + noise.random(whole.shape, np.float32)) if settings.stochastic else np.rint(whole)
    return (np.clip(whole, -MOST_STEPS, MOST_STEPS) + np.float32(0)) * step, float(step)


def _step(change: NDArray[np.floating], bits: float) -> float:
    """The step at which whole steps of `change` take `bits` bits a number; 1 where nothing changes.

    Found on a sample, by halving an interval around the spread: the entropy falls as the step grows.
    """
    flat = change.reshape(-1)
    sample = flat[:: max(1, flat.size // SAMPLE)]
    spread = float(np.sqrt(np.mean(np.square(sample, dtype=np.float64)))) if sample.size else 0.0
    if not 0 < spread < np.inf:
        spread = float(np.abs(flat).max(initial=0.0)) or 1.0
    low, high = np.log2(spread) - 14, np.log2(spread) + 6
    for _ in range(SEARCH):
        middle = (low + high) / 2
        whole = np.rint(sample / 2.0**middle)
        low, high = (
            (middle, high) if entropy_bits(whole.astype(np.int64)) > bits * sample.size else (low, middle)
        )
    return float(2.0**high)


def _power_of_two(step: float) -> float:
    """The nearest power of two, 1 at least: any two states then differ by multiples of the finer one."""
    return float(2.0 ** max(0, round(np.log2(step))))


def _bfloat16(values: Floats) -> Floats:
    """The nearest bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _round_gaps(topk: TopK, base: TopK, noise: np.random.Generator) -> TopK:
    """Gaps on the grid by chance, in the mean as they were; a row that stays keeps the base's bits."""
    stayed = (topk.positions == base.positions).all(axis=1, keepdims=True)
    start = np.where(stayed, base.gaps, np.float32(0))
    moves = np.floor((topk.gaps - start) / np.float32(GAP_STEP) + noise.random(topk.gaps.shape, np.float32))
    moves = np.clip(moves, -LARGEST_GAP, LARGEST_GAP).astype(np.int64)
    codes = np.clip(np.where(stayed, gap_codes(base.gaps), 0) + moves, 0, LARGEST_GAP)
    gaps = np.maximum.accumulate(codes, axis=1).astype(np.float32) * np.float32(GAP_STEP)
    still = stayed[:, 0] & (moves == 0).all(axis=1)
    return TopK(topk.positions, np.where(still[:, None], base.gaps, gaps))
