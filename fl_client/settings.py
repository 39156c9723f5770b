"""What a site is told: its data, its model, its adapter. Read from Flower's flat run config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar

from fl_client.hazards import HazardSettings
from fl_client.optim import decay_faults
from fl_client.personal import PersonalSettings
from fl_client.train import LocalSettings
from vblora.errors import ConfigError, raise_faults
from vblora.rounding import WIRES, WireSettings, wire_settings
from vblora.spec import (
    ADAPTERS,
    AdapterSpec,
    Linear,
    VBLoRASpec,
    choose_num_vectors,
    choose_vector_length,
    row_slices,
)
from vblora.start import Found

__all__ = ["AdapterSettings", "ComputeSettings", "DataSettings", "SiteSettings", "from_config"]

QUANTIZE = ("none", "4bit", "8bit")
TASKS = ("auto", "classification", "causal-lm")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class DataSettings:
    """Which texts, and which part of them is whose.

    Attributes:
        data: "docstrings", a local file or folder, or a hub data set id.
        task: classification, causal-lm, or auto: what the columns suggest.
        text_column, label_column: names, where the usual ones do not fit.
        labels: names of all classes, by comma, where a site does not hold every one; "" takes those of the
            data. Sites agree on classes by name: the order given does not matter.
        eval_split: splits that the score is taken on, such as "dev" or "dev+test"; "" takes the first of
            dev, test; "train" is a tenth carved off the training texts.
        eval_examples: held-out texts at most, drawn from the seed; 0 is all.
        max_examples: training texts at most; 0 is all, or 4,000 docstrings (reading them all takes a minute).
        max_length: tokens of a text at most; of plain text that is packed, of a row.
        pack: whether plain text is packed into full rows; prompts with completions and labelled texts never.
        chat_template: auto writes prompts and completions as the tokenizer's chat template does, where it has
            one; off leaves them as they are.
        partition: auto, iid, dirichlet:ALPHA or by:COLUMN.
        clients: parts that the training texts are dealt into.
        seed: of the sample and of the deal.
    """

    data: str = "docstrings"
    task: str = "auto"
    text_column: str = ""
    label_column: str = ""
    labels: str = ""
    eval_split: str = ""
    eval_examples: int = 0
    max_examples: int = 0
    max_length: int = 128
    pack: bool = True
    chat_template: str = "auto"
    partition: str = "auto"
    clients: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        raise_faults("data", self._faults())

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names in `labels`, as they were given."""
        return tuple(name.strip() for name in self.labels.split(",")) if self.labels else ()

    def _faults(self) -> Iterator[str]:
        if not self.data:
            yield "no data named; expected docstrings, a file, a folder or a hub id"
        if self.task not in TASKS:
            yield f"task is {self.task!r}, expected one of {', '.join(TASKS)}"
        for name in ("eval_examples", "max_examples"):
            if getattr(self, name) < 0:
                yield f"{name.replace('_', '-')} is {getattr(self, name)}, expected 0 (all) or more"
        if self.chat_template not in ("auto", "off"):
            yield f"chat-template is {self.chat_template!r}, expected auto or off"
        names = self.label_names
        if self.labels and (len(names) < 2 or "" in names or len(set(names)) < len(names)):
            yield f"labels is {self.labels!r:.60}, expected two different names or more, by comma"
        if self.max_length < 2:
            yield f"max-length is {self.max_length}, expected at least 2"
        if self.clients < 1:
            yield f"clients is {self.clients}, expected at least 1"


@dataclass(frozen=True)
class AdapterSettings:
    """Which adapter. A 0 leaves a size to be chosen from the model; a kind reads the numbers that it has.

    Attributes:
        adapter: a kind, one of `vblora.adapters.ADAPTERS`.
        rank, num_vectors, vector_length, topk, init_std, bank_bound, margin, alpha, theta_length: as in the
            specs there.
        target_modules: all-linear, or layer names separated by commas.
    """

    adapter: str = "vblora"
    rank: int = 0
    num_vectors: int = 0
    vector_length: int = 0
    topk: int = 2
    init_std: float = VBLoRASpec.init_std
    bank_bound: float = VBLoRASpec.bank_bound
    margin: float = VBLoRASpec.margin
    alpha: float = 0.0
    theta_length: int = 0
    target_modules: str = "all-linear"

    def __post_init__(self) -> None:
        raise_faults("adapter", self._faults())

    def _faults(self) -> Iterator[str]:
        if self.adapter not in ADAPTERS:
            yield f"adapter is {self.adapter!r}, expected one of {', '.join(ADAPTERS)}"
        for name in ("rank", "num_vectors", "vector_length", "theta_length"):
            if getattr(self, name) < 0:
                yield f"{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more, or 0 to choose"
        if not 0 <= self.alpha <= 65536:
            yield f"alpha is {self.alpha}, expected 0 (twice the rank) to 65536"
        if not self.target_modules.strip():
            yield "target-modules is empty, expected all-linear or layer names"

    def spec(self, linears: tuple[Linear, ...], seed: int) -> AdapterSpec:
        """The adapter for these layers, open sizes chosen."""
        kind = ADAPTERS[self.adapter]
        rank = self.rank or kind.rank
        length = self.vector_length or choose_vector_length(linears)
        rows = max((part.stop for part in row_slices(linears, rank, length)), default=0)
        vectors = self.num_vectors or choose_num_vectors(rows)
        numbers: dict[str, Any] = {
            "rank": rank,
            "alpha": self.alpha or 2.0 * rank,
            "num_vectors": vectors,
            "vector_length": length,
            "topk": self.topk,
            "init_std": self.init_std,
            "bank_bound": self.bank_bound,
            "margin": self.margin,
            # As many numbers as a bank would have, and each read at least four times.
            "theta_length": self.theta_length or max(1, min(vectors, rows // 4) * length),
            "seed": seed,
        }
        return kind(**{entry.name: numbers[entry.name] for entry in fields(kind) if entry.name in numbers})

    def require(self, found: Found, chosen: frozenset[str] = frozenset()) -> AdapterSpec:
        """The adapter of a file, which decides: what is asked for beside must say the same.

        Args:
            found: the adapter.
            chosen: names of the layers that `target_modules` selects.

        Raises:
            ConfigError: names every option that asks for something else.
        """
        has = {"adapter": found.spec.kind, **vars(found.spec)}
        if chosen == found.layers:
            has["target_modules"] = self.target_modules
        faults = [
            f"{entry.name.replace('_', '-')} is {asked}, the adapter of --start has "
            f"{has.get(entry.name, 'layers of its own')}; leave it out"
            for entry in fields(self)
            if (asked := getattr(self, entry.name)) not in (entry.default, has.get(entry.name))
        ]
        raise_faults("start", faults)
        return found.spec


@dataclass(frozen=True)
class ComputeSettings:
    """How the device is used. It changes what a step takes, and what is trained up to rounding alone.

    Attributes:
        recompute: make the inputs of adapted layers anew in the backward pass where that is cheap.
        checkpointing: keep the input of each block of the base alone, and compute the block twice.
        cuda_graphs: capture passes as CUDA graphs and replay them.
        fused_norms: on a GPU, let PyTorch's own kernel stand for root mean square norms.
    """

    recompute: bool = False
    checkpointing: bool = False
    cuda_graphs: bool = False
    fused_norms: bool = True


@dataclass(frozen=True)
class SiteSettings:
    """Everything that one process needs to serve its clients; equal settings share one loaded model.

    Attributes:
        model: minilm, a hub id, or a local folder.
        device: auto, cpu, cuda, ...
        dtype: of the base; auto, or a name of torch's.
        quantize: linear layers of the base in few bits: none, 4bit or 8bit.
        start: folder of an adapter to go on from, see `vblora.imports`; "" starts from the seed.
        cohort: clients trained in one forward; 0 leaves it to be chosen.
        data, adapter, local, personal, hazards, compute: see there.
        wire: how updates are rounded.
        state: folder of what the clients keep between rounds; "" keeps it in the process. Never read from a
            run config: a server does not choose where a site writes.
    """

    model: str = "minilm"
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    start: str = ""
    cohort: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    local: LocalSettings = field(default_factory=LocalSettings)
    personal: PersonalSettings = field(default_factory=PersonalSettings)
    hazards: HazardSettings = field(default_factory=HazardSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    wire: WireSettings = WIRES["default"]
    state: str = ""

    def __post_init__(self) -> None:
        raise_faults("site", self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.model:
            yield "model is empty, expected minilm, a hub id or a local folder"
        if self.quantize not in QUANTIZE:
            yield f"quantize is {self.quantize!r}, expected one of {', '.join(QUANTIZE)}"
        banked = (
            {"bank"}
            if "num_vectors" in {entry.name for entry in fields(ADAPTERS[self.adapter.adapter])}
            else ()
        )
        yield from decay_faults(self.local.weight_decay, banked)
        if self.cohort < 0:
            yield f"cohort is {self.cohort}, expected 1 or more, or 0 to choose it"

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> SiteSettings:
        """Read Flower's run config; keys that are not a site's are left alone.

        Raises:
            ConfigError: every fault of every part, together.
        """
        faults = []
        parts: dict[str, Any] = {}
        kinds: dict[str, type[Any]] = {
            "data": DataSettings,
            "adapter": AdapterSettings,
            "local": LocalSettings,
            "personal": PersonalSettings,
            "hazards": HazardSettings,
            "compute": ComputeSettings,
        }
        renamed = {**config, "steps": config.get("local-steps", LocalSettings.steps)}
        for name, kind in kinds.items():
            try:
                parts[name] = from_config(kind, renamed)
            except ConfigError as error:
                faults.append(str(error))
        try:
            parts["wire"] = wire_settings(config)
        except ConfigError as error:
            faults.append(str(error))
        try:
            own = {key: value for key, value in config.items() if key not in ("wire", "state")}
            site = cls(**_values(cls, own))
        except ConfigError as error:
            faults.append(str(error))
        if faults:
            raise ConfigError("; ".join(faults))
        return replace(site, **parts)


def from_config(kind: type[Settings], config: Mapping[str, Any]) -> Settings:
    """Build a settings dataclass from the keys of a flat config that are its fields, written with dashes."""
    return kind(**_values(kind, config))


def _values(kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that a config names, each of the type of its default; nested ones are left
    out.

    Raises:
        ConfigError: another type. Flower checks the names of `-c "name=value"`, not the values.
    """
    values, faults = {}, []
    for entry in fields(kind):
        key = entry.name.replace("_", "-")
        if entry.default is MISSING or key not in config:
            continue
        wanted, value = type(entry.default), config[key]
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            faults.append(f"{key} is {value!r}, expected {KINDS[wanted]}")
        values[entry.name] = value
    raise_faults("options", faults)
    return values
