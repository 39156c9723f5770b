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
from simulations.replay import PHASES, replayed_update, write_message
from simulations.skeleton import Skeleton, skeleton
from vblora.candidates import WIDTH
from vblora.errors import raise_faults
from vblora.frame import section_bytes
from vblora.model import describe_base, find_head, find_linears
from vblora.rounding import WIRES, WireSettings, wire_settings
from vblora.spec import AdapterSpec, Blueprint

__all__ = [
    "AdapterPlan",
    "Federation",
    "Plan",
    "plan_adapter",
    "plan_adapters",
    "training_bytes",
]

WHOLE = 1 << 22  # numbers up to which an update is written whole; of a larger one, a part of its layers
LINK = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:bit|b(?=ps))(?:/s|ps)?", re.IGNORECASE)
PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
FLOAT32, BFLOAT16 = 4, 2


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
        encoded_share: of the adapter's numbers that was encoded; the bytes are scaled up from it.
        training_bytes: of trained tensors, gradients and moments on a client.
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
    encoded_share: float
    training_bytes: int

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
        adapters: by name.
    """

    model: str
    classes: int
    parameters: int
    adapters: Mapping[str, AdapterPlan]

    @property
    def base_bytes(self) -> int:
        """Of the frozen model in bfloat16."""
        return BFLOAT16 * self.parameters


def plan_adapters(
    model: str, classes: int | None, adapters: Mapping[str, Config], given: Mapping[str, Any]
) -> Plan:
    """Plan several adapters on one model.

    Args:
        model, classes: see `skeleton`.
        adapters: keys of a config by name, see `parse_adapters`.
        given: keys that all share, such as `target-modules` and the wire's.

    Raises:
        ConfigError, ModelError: there is no such model, or an adapter does not fit it.
    """
    wire = wire_settings(given)
    base = skeleton(model, classes)
    return Plan(
        model,
        base.classes,
        base.parameters,
        {name: plan_adapter(base, {**given, **keys}, wire) for name, keys in adapters.items()},
    )


def plan_adapter(base: Skeleton, config: Mapping[str, Any], wire: WireSettings) -> AdapterPlan:
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
        encoded_share=share,
        training_bytes=training_bytes(blueprint),
    )


def training_bytes(blueprint: Blueprint) -> int:
    """Bytes that training keeps on a client beside the base: values, gradients and two moments in float32;
    of logits the candidates alone, and the bank vector that each scores. Activations come on top."""
    dense = sum(math.prod(shape) for shape in blueprint.dense_shapes.values())
    if blueprint.topk_shape is None:
        return 4 * FLOAT32 * dense
    rows, _, h = blueprint.topk_shape
    logits = rows * min(h, WIDTH)
    return 4 * FLOAT32 * (dense + logits) + logits * (2 if h < 1 << 15 else 4)


def _sections(blueprint: Blueprint, phase: str, wire: WireSettings) -> dict[str, int]:
    reference, exact = replayed_update(blueprint, phase)
    return {"head": 0, **section_bytes(write_message(blueprint, phase, reference, exact, wire))}


def _part(blueprint: Blueprint) -> tuple[Blueprint, float]:
    """As many layers as `WHOLE` numbers take, drawn from the seed, and their share of all numbers.

    What an update of free factors weighs goes by the number of factors: a replay draws all alike.
    """
    whole = _dense(blueprint)
    if whole <= WHOLE:
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
