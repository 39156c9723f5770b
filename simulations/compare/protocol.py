"""Which runs a comparison is made of: the same splits, clients, steps and seeds for every adapter.

Rates are chosen first, of a small grid for each adapter, by training on nine tenths of the training texts and
scoring on the rest (`eval-split` "train"), with seeds of their own: never on what is scored on in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_client.train import RATES
from simulations.compare.results import FLOAT32
from simulations.config import Config
from vblora.errors import ConfigError, raise_faults
from vblora.rounding import wire_keys

__all__ = ["GRID", "TUNING_SEEDS", "Contender", "Planned", "Protocol", "contenders"]

GRID = (0.5, 1.0, 2.0)  # times the rate that a run would have without being tuned
TUNING_SEEDS = 1000  # from here on, above those of the runs that are compared


@dataclass(frozen=True)
class Contender:
    """One adapter of a comparison.

    Attributes:
        name: in tables, such as "lora:8" or "lora:8 float32".
        keys: of a config that make it.
        rate: the key whose values are tried.
        values: of the grid, the middle one what a run has by default.
    """

    name: str
    keys: Config
    rate: str
    values: tuple[float, ...]

    @property
    def default(self) -> float:
        """The rate without tuning."""
        return self.values[len(self.values) // 2]


@dataclass(frozen=True, eq=False)
class Planned:
    """One run: of a contender, at a rate, with a seed; on validation where it is for choosing the rate."""

    contender: str
    rate: float
    seed: int
    tuning: bool
    config: Config

    @property
    def out(self) -> Path:
        """Its run directory."""
        return Path(str(self.config["out"]))

    @property
    def label(self) -> str:
        """In a line of text."""
        what = "tuning " if self.tuning else ""
        return f"{what}{self.contender}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Protocol:
    """What all runs share, and what differs.

    Attributes:
        base: the config of every run but for a contender's keys, the seed and the directory.
        contenders: by name, the baseline first.
        baseline: the name of the LoRA that the others are compared with.
        seeds: runs of each contender; they have the seeds from `base`'s on.
        tune: seeds that each rate is tried with; 0 takes the rates as they are.
        out: the directory of everything.
    """

    base: Config
    contenders: Mapping[str, Contender]
    baseline: str
    seeds: int
    tune: int
    out: Path

    def __post_init__(self) -> None:
        raise_faults("compare", self._faults())

    def _faults(self) -> Iterator[str]:
        if self.seeds < 1:
            yield f"seeds is {self.seeds}, expected at least 1"
        if self.tune < 0:
            yield f"tune is {self.tune}, expected 1 or more, or 0 to take the rates as they are"
        if self.tune > 0 and self.base["eval-split"] == "train":
            yield "eval-split is 'train', of which rates are chosen: give --tune 0, or score on other texts"
        if int(self.base["seed"]) + self.seeds > TUNING_SEEDS:
            yield f"seed is {self.base['seed']}: seeds from {TUNING_SEEDS} on are those of the tuning"

    def tuning_runs(self) -> list[Planned]:
        """Every rate of every contender with every seed of the tuning."""
        return [
            self._planned(contender, value, TUNING_SEEDS + number, tuning=True)
            for number in range(self.tune)
            for contender in self.contenders.values()
            for value in contender.values
        ]

    def final_runs(self, rates: Mapping[str, float]) -> list[Planned]:
        """Every contender at its rate with every seed."""
        first = int(self.base["seed"])
        return [
            self._planned(contender, rates[contender.name], first + number, tuning=False)
            for number in range(self.seeds)
            for contender in self.contenders.values()
        ]

    def folder(self, name: str, *, tuning: bool = False) -> Path:
        """Where all runs of a contender lie."""
        return self.out / ("tuning" if tuning else "runs") / name.replace(":", "-").replace(" ", "-")

    def _planned(self, contender: Contender, rate: float, seed: int, *, tuning: bool) -> Planned:
        place = self.folder(contender.name, tuning=tuning)
        config: Config = {
            **self.base,
            **contender.keys,
            contender.rate: rate,
            "seed": seed,
            "out": str(place / f"{contender.rate}-{rate:g}" / f"seed-{seed}"),
        }
        if tuning:
            config["eval-split"] = "train"
        return Planned(contender.name, rate, seed, tuning, config)


def contenders(adapters: Mapping[str, Config], base: Config) -> tuple[dict[str, Contender], str]:
    """The contenders by name, and the name of the baseline: the first LoRA, its messages in float32.

    Where messages are rounded, that LoRA stands twice: in float32, and through the codec that all others use.

    Raises:
        ConfigError: no LoRA to compare with.
    """
    lora = next((name for name, keys in adapters.items() if keys["adapter"] == "lora"), None)
    if lora is None:
        raise ConfigError("--adapters: no LoRA to compare with; name one, such as lora:8")
    float32: Config = {**wire_keys(), "wire": "lossless"}
    rounded = any(base[key] != value for key, value in float32.items())
    named = {f"{lora}{FLOAT32}": {**adapters[lora], **float32}} if rounded else {}
    baseline = next(iter(named), lora)
    named |= {name: {**adapters[name]} for name in (lora, *adapters)}
    return {name: _contender(name, keys, base) for name, keys in named.items()}, baseline


def _contender(name: str, keys: Config, base: Config) -> Contender:
    """With the rate of its main tensor: the bank, or what a kind without one trains. A bank takes no weight
    decay."""
    kind = str(keys["adapter"])
    if kind in RATES:
        rate, default = "lr-rows", float(base["lr-rows"]) or RATES[kind]
    else:
        rate, default = "lr-bank", float(base["lr-bank"])
        keys = {**keys, "weight-decay": 0.0}
    return Contender(name, keys, rate, tuple(default * factor for factor in GRID))
