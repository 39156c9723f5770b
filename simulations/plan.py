"""What an adapter costs to communicate, before anything is trained: no weights, no texts.

Bytes are those of encoded messages. What is in them is drawn from a recorded run (`simulations.replay`), row
by row, so they are as large as a real run's where it moves as that one did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fl_client.settings import AdapterSettings, from_config
from simulations.config import Config
from simulations.memory_plan import Memory, Training, base_shape, fitting_settings, predicted_memory
from simulations.replay import PHASES, replayed_update, write_message
from simulations.skeleton import Skeleton, skeleton
from vblora.errors import ModelError, raise_faults
from vblora.frame import section_bytes
from vblora.model import describe_base, find_head, find_linears
from vblora.rounding import WIRES, WireSettings, wire_settings
from vblora.spec import AdapterSpec, Blueprint

__all__ = [
    "AdapterPlan",
    "Device",
    "Federation",
    "Plan",
    "plan_adapter",
    "plan_adapters",
]

WHOLE = 1 << 22  # numbers up to which an update is written whole; of a larger one, a part of its layers
LINK = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:bit|b(?=ps))(?:/s|ps)?", re.IGNORECASE)
PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class Federation:
    """Who talks how often.

    Attributes:
        clients: that train in a round.
        rounds: of training.
        link: speed of one client's link, such as "20mbit", "1.5 Gbit/s" or "500kbps".
    """

    clients: int
    rounds: int
    link: str

    def __post_init__(self) -> None:
        raise_faults("plan", self._faults())

    @property
    def bits_per_second(self) -> float:
        """Of the link; 0 where its speed cannot be read."""
        match = LINK.fullmatch(self.link.strip())
        return float(match[1]) * PREFIXES[match[2].lower()] if match else 0.0

    def _faults(self) -> Iterator[str]:
        for name in ("clients", "rounds"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, expected at least 1"
        if not self.bits_per_second:
            yield f"link is {self.link!r}, expected a number with kbit, mbit or gbit, such as 20mbit"


@dataclass(frozen=True)
class Device:
    """What a client trains on, and with.

    Attributes:
        gib: memory of the device; None where no one asks what fits.
        rows, length: texts of a step, tokens of each.
    """

    gib: float | None = None
    rows: int = 4
    length: int = 512

    def __post_init__(self) -> None:
        raise_faults("plan", self._faults())

    def _faults(self) -> Iterator[str]:
        if self.gib is not None and not self.gib > 0:
            yield f"device-memory is {self.gib:g}, expected GiB above 0"
        for name, key in (("rows", "batch-size"), ("length", "max-length")):
            if getattr(self, name) < 1:
                yield f"{key} is {getattr(self, name)}, expected at least 1"


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter on one model. Bytes and numbers leave the task head out, which `head` counts apart.

    Attributes:
        spec: with all sizes chosen.
        rows: S.
        trained: numbers that receive gradients, logits counted densely.
        stored: numbers that a state is made of.
        head: numbers of the task head.
        up_bytes_first, up_bytes_steady: of an update of round 1, and of the last third of a run.
        down_bytes: from one state to the next.
        float32_bytes: of an update in float32, through the same frame.
        head_up_bytes, head_down_bytes: of the head, steady.
        head_float32_bytes: of the head going up in float32.
        encoded_share: of the adapter's numbers that was encoded; the bytes are scaled up from it.
        memory: of a client's step with the base in bfloat16 and everything kept; None where the model's
            config does not tell its width.
        fitting: settings whose step fits the device, the fastest first; None where no device was named.
    """

    spec: AdapterSpec
    rows: int
    trained: int
    stored: int
    head: int
    up_bytes_first: int
    up_bytes_steady: int
    down_bytes: int
    float32_bytes: int
    head_up_bytes: int
    head_down_bytes: int
    head_float32_bytes: int
    encoded_share: float
    memory: Memory | None
    fitting: tuple[tuple[Training, Memory], ...] | None

    def client_bytes(self, rounds: int) -> int:
        """Both directions, head included, of a client that trains in every round.

        Sets change most at the start: the first third of the rounds counts as round 1, the others as steady.
        """
        first = math.ceil(rounds / 3)
        up = first * self.up_bytes_first + (rounds - first) * self.up_bytes_steady
        return up + rounds * (self.down_bytes + self.head_up_bytes + self.head_down_bytes)

    def hours(self, federation: Federation) -> float:
        """On one client's link, for all rounds."""
        return 8 * self.client_bytes(federation.rounds) / federation.bits_per_second / 3600


@dataclass(frozen=True)
class Plan:
    """What was planned.

    Attributes:
        model: as it was asked for.
        classes: of the task head; 0 without one.
        parameters: of the base.
        device: whose memory was looked at.
        adapters: by name.
    """

    model: str
    classes: int
    parameters: int
    device: Device
    adapters: Mapping[str, AdapterPlan]


def plan_adapters(
    model: str,
    classes: int | None,
    adapters: Mapping[str, Config],
    given: Mapping[str, Any],
    device: Device | None = None,
) -> Plan:
    """Plan several adapters on one model.

    Args:
        model, classes: see `skeleton`.
        adapters: keys of a config by name, see `parse_adapters`.
        given: keys that all share, such as `target-modules` and the wire's.
        device: that a client trains on.

    Raises:
        ConfigError, ModelError: there is no such model, or an adapter does not fit it.
    """
    wire, device = wire_settings(given), device or Device()
    base = skeleton(model, classes)
    made = {name: plan_adapter(base, {**given, **keys}, wire, device) for name, keys in adapters.items()}
    return Plan(model, base.classes, base.parameters, device, made)


def plan_adapter(
    base: Skeleton, config: Mapping[str, Any], wire: WireSettings, device: Device
) -> AdapterPlan:
    """Plan the adapter that the keys of a config make, as `fedvb simulate` would make it.

    Raises:
        ConfigError, ModelError: it does not fit the model.
    """
    settings = from_config(AdapterSettings, config)
    linears = find_linears(base.model, settings.target_modules)
    blueprint = Blueprint(
        spec=settings.spec(linears, 0),
        linears=linears,
        head=find_head(base.model),
        model=describe_base(base.model),
    )
    part, share = _part(blueprint)
    sizes = {phase: _sections(part, phase, wire) for phase in PHASES}
    float32 = _sections(part, "first", WIRES["lossless"])
    own = {phase: round((sum(found.values()) - found["head"]) / share) for phase, found in sizes.items()}
    memory, fitting = _memory(base, blueprint, device)
    return AdapterPlan(
        spec=blueprint.spec,
        rows=blueprint.rows,
        trained=blueprint.trained_parameters - blueprint.head_size,
        stored=blueprint.stored_parameters - blueprint.head_size,
        head=blueprint.head_size,
        up_bytes_first=own["first"],
        up_bytes_steady=own["steady"],
        down_bytes=own["down"],
        float32_bytes=round((sum(float32.values()) - float32["head"]) / share),
        head_up_bytes=sizes["steady"]["head"],
        head_down_bytes=sizes["down"]["head"],
        head_float32_bytes=float32["head"],
        encoded_share=share,
        memory=memory,
        fitting=fitting,
    )


def _memory(
    base: Skeleton, blueprint: Blueprint, device: Device
) -> tuple[Memory | None, tuple[tuple[Training, Memory], ...] | None]:
    """What a step takes, and what fits."""
    try:
        shape = base_shape(base.model)
    except ModelError:
        if device.gib is not None:
            raise
        return None, None
    memory = predicted_memory(shape, blueprint, Training(device.rows, device.length))
    if device.gib is None:
        return memory, None
    return memory, tuple(fitting_settings(shape, blueprint, device.gib, device.rows, device.length))


def _sections(blueprint: Blueprint, phase: str, wire: WireSettings) -> dict[str, int]:
    reference, exact = replayed_update(blueprint, phase)
    return {"head": 0, **section_bytes(write_message(blueprint, phase, reference, exact, wire))}


def _part(blueprint: Blueprint) -> tuple[Blueprint, float]:
    """As many layers as `WHOLE` numbers take, drawn from the seed, and their share of all numbers.

    What an update of free factors weighs goes by the number of factors: a replay draws all alike. A bank and
    a vector are as large for one layer as for all.
    """
    whole = _dense(blueprint)
    if whole <= WHOLE or {"bank", "theta"} & blueprint.dense_shapes.keys():
        return blueprint, 1.0
    order = np.random.default_rng(0).permutation(len(blueprint.linears))
    part = blueprint
    for count in range(1, len(order) + 1):
        chosen = sorted(order[:count])
        part = replace(blueprint, linears=tuple(blueprint.linears[at] for at in chosen))
        if _dense(part) >= WHOLE:
            break
    return part, _dense(part) / whole


def _dense(blueprint: Blueprint) -> int:
    """Numbers of the adapter's float sections."""
    return sum(math.prod(shape) for name, shape in blueprint.dense_shapes.items() if name != "head")
