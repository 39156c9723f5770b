"""What is given up so that a message becomes small, and who remembers it.

An update is rounded to steps that its sender chooses by the bits they cost, not by its largest number: to
the nearest one, by chance, or along a trellis (`vblora.trellis`). A state is rounded to a fixed grid around
the values of version 0, so that the difference of any two states is a few whole numbers, and adding them
gives the same bits everywhere. What rounding drops stays with whoever rounded, and is added to what he
sends next (error feedback, arXiv 1901.09847). Gaps of logits are rounded up or down by chance, so that
means over clients and rounds come out right without any memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import LARGEST
from vblora.errors import ConfigError, raise_faults
from vblora.selection import round_selection
from vblora.state import State, Update
from vblora.steps import Rounding, find_step
from vblora.trellis import round_lanes

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
FINEST_GAPS = 6  # bits of a gap near 0: all values of `vblora.gaps`
FLOAT32, BFLOAT16 = 32.0, 16.0
FAR = 8.0  # a state with a number as large is sent whole: the grid may not tell it from its neighbours
SWITCH = ("on", "off", "auto")


@dataclass(frozen=True)
class WireSettings:
    """How messages are rounded. A preset of `WIRES`, or parts of one replaced.

    Attributes:
        up_bits: of a number of the bank's (or the rows') change in an update; 32 is float32, 16 bfloat16,
            less is a mean over entropy-coded steps.
        head_bits: the same, of the head's change.
        gap_bits: of a gap of an update: 6 is steps of 2^-6 while gaps are small, 1 is steps of 1/2 (see
            `vblora.gaps`); 32 is float32. States have 6, or 32 where `down_bits` is.
        down_bits: of a number's change from one state to the next; 32 sends whole float32 states.
        keep: share of an update's largest numbers that are sent, in the steps that all of them would have;
            the others are zeros, which cost little, and wait in the error feedback.
        feedback: clients add what rounding dropped to their next update.
        stochastic: clients round their change up or down by chance instead of to the nearest step.
        trellis: clients round along a trellis (`vblora.trellis`): 0.15 bits a number fewer at the same error,
            for five times the work; not with `stochastic`, nor where `keep` is below 1.
    """

    up_bits: float = 32.0
    head_bits: float = 32.0
    gap_bits: float = 32.0
    down_bits: float = 32.0
    keep: float = 1.0
    feedback: bool = False
    stochastic: bool = False
    trellis: bool = False

    def __post_init__(self) -> None:
        raise_faults("wire", self._faults())

    def _faults(self) -> Iterator[str]:
        for name in ("up_bits", "head_bits"):
            bits = getattr(self, name)
            if not (0.5 <= bits <= 12 or bits in (BFLOAT16, FLOAT32)):
                yield f"{name.replace('_', '-')} is {bits:g}, expected 0.5 to 12, 16 or 32 (bf16, float32)"
        if self.gap_bits not in (*range(1, FINEST_GAPS + 1), FLOAT32):
            yield f"gap-bits is {self.gap_bits:g}, expected 1 to {FINEST_GAPS}, or 32 (float32)"
        if not (0.5 <= self.down_bits <= 12 or self.down_bits == FLOAT32):
            yield f"down-bits is {self.down_bits:g}, expected 0.5 to 12, or 32 (float32)"
        if not 0 < self.keep <= 1:
            yield f"keep is {self.keep:g}, expected above 0, at most 1"
        elif self.keep < 1 and max(self.up_bits, self.head_bits) > 12:
            yield f"keep is {self.keep:g}: it saves bytes only with up-bits and head-bits of 12 or less"

    @property
    def lossless(self) -> bool:
        """Whether updates travel as they are, selections included."""
        return self.up_bits == self.head_bits == self.gap_bits == FLOAT32 and self.keep == 1

    def bits(self, section: str) -> float:
        """Bits of a number of an update's section."""
        return self.head_bits if section == "head" else self.up_bits


WIRES: Mapping[str, WireSettings] = {
    "lossless": WireSettings(),
    "default": WireSettings(up_bits=3.0, head_bits=5.0, gap_bits=4.0, down_bits=3.5),
    "smallest": WireSettings(up_bits=1.25, head_bits=2.75, gap_bits=3.0, down_bits=2.5, trellis=True),
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
    if topk is not None and reference.topk is not None and settings.gap_bits < FLOAT32:
        topk = round_selection(topk, reference.topk, FINEST_GAPS - int(settings.gap_bits), noise)
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
        if not float(np.abs(wanted).max(initial=0.0)) < FAR:
            dense[name] = wanted
            continue
        held = on_grid(old, start)
        change = (wanted.astype(np.float64) - (start if held is None else old)) / GRID
        if held is None:  # the last one was sent whole, and so is this one; the next need not be
            whole = np.rint(change)
        else:
            coarse = _power_of_two(find_step(change, settings.down_bits))
            whole = held + np.rint(change / coarse) * coarse
        dense[name] = from_grid(start, whole.astype(np.int64))
        left[name] = wanted - dense[name]
    topk = exact.topk
    if topk is not None and reference.topk is not None:
        topk = round_selection(topk, reference.topk, 0, np.random.default_rng(exact.version))
    return State(exact.version, dense, topk), left


def from_grid(initial: Floats, steps: Ints) -> Floats:
    """`initial` plus whole steps of the grid. Exact in float64, rounded once: the same bits everywhere."""
    return (initial.astype(np.float64) + steps * GRID).astype(np.float32)


def on_grid(values: Floats, initial: Floats) -> Ints | None:
    """The steps from `initial` to `values`, or None where there are values off the grid, -0 among them."""
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint((values.astype(np.float64) - initial) / GRID)
    if not (np.abs(steps) <= LARGEST).all():
        return None
    whole = steps.astype(np.int64)
    same = np.array_equal(from_grid(initial, whole).view(np.uint32), values.view(np.uint32))
    return whole if same else None


def _rounded(
    change: Floats, settings: WireSettings, bits: float, noise: np.random.Generator
) -> tuple[Floats, float]:
    """A change on steps, and the step; 0 where it is not on steps."""
    if not np.isfinite(change).all():
        return change, 0.0  # training has diverged: the receiver shall see it
    if bits == FLOAT32:
        return change, 0.0
    if bits == BFLOAT16:
        return _bfloat16(change), 0.0
    how: Rounding = "chance" if settings.stochastic else "nearest"
    if settings.trellis and how == "nearest" and settings.keep == 1:  # it may move what is not to be sent
        how = "trellis"
    step = np.float32(find_step(change, bits, how))
    if how == "trellis":
        whole = round_lanes(change, float(step)).astype(np.float32)
    else:
        whole = np.floor(change / step + (noise.random(change.shape, np.float32) if how == "chance" else 0.5))
    if settings.keep < 1:
        size = np.abs(change)
        whole = np.where(size >= np.quantile(size, 1 - settings.keep), whole, np.float32(0))
    return (whole + np.float32(0)) * step, float(step)  # + 0: no -0


def _power_of_two(step: float) -> float:
    """The nearest power of two, 1 at least: any two states then differ by multiples of the finer one."""
    return float(2.0 ** max(0, round(np.log2(step))))


def _bfloat16(values: Floats) -> Floats:
    """The nearest bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
