"""Settings of the server, read from Flower's run config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from fl_server.exchange import Scalar
from fl_server.stepping import StepSettings, step_settings
from vblora.adapters import MAX_SEED
from vblora.errors import raise_faults
from vblora.rounding import WIRES, WireSettings, wire_settings

__all__ = ["SCHEDULES", "ServerSettings"]

SCHEDULES = ("cosine", "root", "constant")
SPACES = ("weights", "logits")
LIMITS: Mapping[str, tuple[float, float]] = {
    "rounds": (1, 1_000_000),
    "clients": (1, 1_000_000),
    "clients_per_round": (1, 1_000_000),
    "seed": (0, MAX_SEED - 1),
    "final_scale": (0, 1),
    "warmup_rounds": (0, 1_000_000),
    "eval_every": (1, 1_000_000),
    "eval_generate": (0, 1_000_000),
    "freeze_bank": (0, 1_000_000),
    "late_clients": (0, 1_000_000),
    "wait_seconds": (0, 7 * 86400),
    "timeout_seconds": (0, 7 * 86400),
    "train_seconds": (0, 7 * 86400),
    "quorum": (1, 1_000_000),
    "close_at": (0, 1),
    "clip_updates": (0, 1_000_000),
    "max_reply": (0, 1 << 40),
    "logits_every": (1, 1_000_000),
}


@dataclass(frozen=True)
class ServerSettings:
    """One run as the server sees it. In the run config the names have dashes: `clients-per-round`.

    Attributes:
        rounds: to train; may be raised when a run is resumed.
        clients: to wait for at the start.
        clients_per_round: drawn for each round, seeded.
        seed: of that draw.
        schedule: of the learning-rate scale over rounds: "cosine", "root" (1 / sqrt(round)) or "constant".
        final_scale: the scale of the last round, where it is "cosine".
        warmup_rounds: over which the scale rises to 1.
        eval_every: rounds from one evaluation to the next; the start and the last round are always evaluated.
        eval_generate: held-out prompts that are answered at the end of the run and scored; 0 is none.
        own_scores: score each client on held-out texts of its own, too; always done with a personal part.
        personal: what clients keep for themselves, see `fl_client.personal`.
        freeze_bank: the last round that trains the bank; after it every round trains what is left, and the
            bank is not sent; 0 is never.
        late_clients: the last so many clients train only once the bank is frozen.
        out: run directory.
        resume: go on with the run that is there.
        wait_seconds: for the clients to come, and to answer the first message; and, where fewer than
            `quorum` are left in a round, for them to come back before the run pauses.
        timeout_seconds: for the replies of a round; later ones do not count.
        train_seconds: of training that a client is given in a round; it sends what it has then; 0 is off.
        quorum: usable replies that a round needs to count; with fewer it is trained again.
        close_at: share of the asked clients whose usable replies close a round; the others come too late.
        clip_updates: times the round's median that an update may reach, see `fl_server.clipping`; 0 is off.
        max_reply: bytes of a reply at most; 0 is four times what is sent in float32, and a megabyte.
        logits_every: rounds from one in which clients train logits to the next; between them selections
            stay and cost nothing.
        logit_mean: in which space selections are averaged, "weights" or "logits".
        start: folder of the adapter that the clients go on from; "" is none.
        wire: how states are rounded.
        step: what becomes of a round's mean.
    """

    rounds: int = 10
    clients: int = 10
    clients_per_round: int = 5
    seed: int = 0
    schedule: str = "cosine"
    final_scale: float = 0.1
    warmup_rounds: int = 0
    eval_every: int = 1
    eval_generate: int = 0
    own_scores: bool = False
    personal: str = "none"
    freeze_bank: int = 0
    late_clients: int = 0
    out: str = "runs/fedvb"
    resume: bool = False
    wait_seconds: float = 600.0
    timeout_seconds: float = 3600.0
    train_seconds: float = 0.0
    quorum: int = 1
    close_at: float = 1.0
    clip_updates: float = 0.0
    max_reply: int = 0
    logits_every: int = 1
    logit_mean: str = "weights"
    start: str = ""
    wire: WireSettings = WIRES["default"]
    step: StepSettings = field(default_factory=StepSettings)

    def __post_init__(self) -> None:
        raise_faults("server settings", self._faults())

    @classmethod
    def from_run_config(cls, config: Mapping[str, Scalar]) -> ServerSettings:
        """Pick the server's keys; keys of others, the clients', are left alone.

        Raises:
            ConfigError: lists every value that has a wrong type, is out of range, or does not fit another.
        """
        keys = {item.name: item.name.replace("_", "-") for item in fields(cls)}
        values: dict[str, Any] = {name: config[key] for name, key in keys.items() if key in config}
        return cls(**{**values, "wire": wire_settings(config), "step": step_settings(config)})

    def frozen(self, number: int) -> str:
        """Names of the tensors that clients leave alone in a round, by comma."""
        if 0 < self.freeze_bank < number:
            return "bank"
        return "" if (number - 1) % self.logits_every == 0 else "logits"

    def silent(self, number: int) -> frozenset[str]:
        """What updates leave as it is in a round, frozen or personal: of "bank", "logits" and "head"."""
        named = {part.strip() for part in f"{self.frozen(number)},{self.personal}".split(",")}
        return frozenset(named - {"", "none"})

    @property
    def scores_own(self) -> bool:
        """Whether evaluations ask each client for its own score."""
        return self.own_scores or self.personal != "none"

    def eligible(self, clients: Sequence[str], number: int) -> Sequence[str]:
        """Those of the run's clients that a round may draw from; none where all that came are late ones."""
        late = self.late_clients if number <= self.freeze_bank else 0
        return clients[: max(0, len(clients) - late)]

    def enough(self, asked: int) -> int:
        """How many usable replies close a round of so many clients."""
        share = round(self.close_at * asked, 6)  # 0.28 of 25 is 7.000000000000001 to a computer
        return max(self.quorum, math.ceil(share))

    def lr_scale(self, number: int) -> float:
        """What learning rates are multiplied with in a round, counted from 1: above 0, at most 1."""
        if number <= self.warmup_rounds:
            return number / (self.warmup_rounds + 1)
        if self.schedule == "constant":
            return 1.0
        first = self.warmup_rounds + 1
        if self.schedule == "root":
            return float((number - first + 1) ** -0.5)
        progress = (number - first) / max(1, self.rounds - first)
        return self.final_scale + (1 - self.final_scale) * (1 + math.cos(math.pi * progress)) / 2

    def _faults(self) -> Iterator[str]:
        wrong = set()
        for item in fields(self):
            name, value = item.name, getattr(self, item.name)
            if item.default is MISSING:  # has checked itself
                continue
            kind: type[Any] = type(item.default)
            # bool is an int to Python, but not to whoever wrote `rounds = true`; 600 will do for 600.0.
            if type(value) is not kind and not (kind is float and type(value) is int):
                wrong.add(name)
                yield f"{name.replace('_', '-')} is {value!r}, expected {_KINDS.get(kind, kind.__name__)}"
            elif name in LIMITS and not LIMITS[name][0] <= value <= LIMITS[name][1]:
                wrong.add(name)
                yield f"{name.replace('_', '-')} is {value}, expected {LIMITS[name][0]} to {LIMITS[name][1]}"
        if not wrong & {"clients", "clients_per_round"} and self.clients_per_round > self.clients:
            yield (
                f"clients-per-round is {self.clients_per_round} but there are {self.clients} clients; "
                "lower clients-per-round or raise clients"
            )
        if not wrong & {"quorum", "clients_per_round"} and self.quorum > self.clients_per_round:
            yield (
                f"quorum is {self.quorum} but clients-per-round is {self.clients_per_round}; "
                "lower quorum or raise clients-per-round"
            )
        if not wrong & {"late_clients", "freeze_bank"} and self.late_clients and not self.freeze_bank:
            yield f"late-clients is {self.late_clients} without freeze-bank; say after which round they come"
        if not wrong & {"late_clients", "freeze_bank", "rounds"} and (
            self.late_clients and self.freeze_bank >= self.rounds
        ):
            yield (
                f"late-clients is {self.late_clients}, which come after round {self.freeze_bank} "
                f"(freeze-bank) of {self.rounds}; raise rounds or lower freeze-bank"
            )
        if not wrong & {"late_clients", "clients", "clients_per_round"} and (
            self.late_clients > max(0, self.clients - self.clients_per_round)
        ):
            yield (
                f"late-clients is {self.late_clients}, which leaves fewer than the {self.clients_per_round} "
                "clients-per-round at first; lower one of them or raise clients"
            )
        if "clip_updates" not in wrong and 0 < self.clip_updates < 1:
            yield f"clip-updates is {self.clip_updates}, expected 0 (off) or at least 1"
        if not wrong & {"clip_updates", "logit_mean"} and self.clip_updates and self.logit_mean == "logits":
            yield (
                f"clip-updates is {self.clip_updates:g} with logit-mean logits, where one client may move "
                "a selection as far as it likes; take logit-mean weights, or leave clip-updates out"
            )
        if "schedule" not in wrong and self.schedule not in SCHEDULES:
            yield f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}"
        if "logit_mean" not in wrong and self.logit_mean not in SPACES:
            yield f"logit-mean is {self.logit_mean!r}, expected one of {', '.join(SPACES)}"
        if "out" not in wrong and not self.out:
            yield "out is empty, expected the run directory"


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
