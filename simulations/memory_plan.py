"""What local training takes of a device's memory, and which settings fit into it. No weights, no device.

Counted is what lies there at the worst moment of a step: the base, the adapter with its gradients and
moments, what autograd keeps of every layer, the logits over the vocabulary, and what layers need in passing.
Tests hold the parts to what PyTorch keeps on a CPU; `simulations.bench.trainer7b` prints prediction and peak
of a GPU.

Letters: d hidden width, q and k width of all query and key heads, i inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from vblora.candidates import WIDTH
from vblora.errors import ModelError, raise_faults
from vblora.model import find_head, find_linears
from vblora.spec import Blueprint

__all__ = [
    "BaseShape",
    "Memory",
    "Training",
    "adapter_bytes",
    "base_shape",
    "fitting_settings",
    "kept_of_layer",
    "predicted_memory",
]

GIB = 1 << 30
NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
# Bytes a weight. NF4 has a constant of one byte for every 64, and a float32 for every 256 of these.
QUANTISED = {"none": 0.0, "8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
CONTEXT = 0.6 * GIB  # CUDA's own, which PyTorch does not count
SLACK = 0.05  # of the rest: what the allocator cannot use
KEEPING = ((False, False), (True, False), (False, True))  # recompute, checkpointing; from fast to slow


@dataclass(frozen=True)
class BaseShape:
    """What of a base model takes memory; numbers are counts, not bytes.

    Attributes:
        linear: in linear layers that can be quantised: all but the output embedding and a task head.
        other: in everything else, each shared one once.
        largest: of the largest linear layer.
        layers, hidden, queries, keys, inner: L, d, q, k, i.
        vocabulary: V of the logits; 0 where a classifier stands in their place.
        gated: whether the MLP is act(gate x) * up x, as a Llama's, and norms are root mean squares; else
            act(up x) and layer norms, as a BERT's.
    """

    linear: int
    other: int
    largest: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    gated: bool


@dataclass(frozen=True)
class Training:
    """How a site trains.

    Attributes:
        rows, length: texts of a step, tokens of each.
        dtype: of the base and its activations.
        quantize: none, 8bit or 4bit: how the base's linear layers lie in memory.
        fused_norms: whether norms are one kernel each, as on a GPU unless told otherwise.
        recompute: make inputs of adapted layers anew where that is cheap; not of quantised layers.
        checkpointing: keep one input a layer, and compute the layer again for its gradients.
        accumulate: pieces that the texts of a step are passed in, one after another.
    """

    rows: int = 4
    length: int = 512
    dtype: str = "bfloat16"
    quantize: str = "none"
    recompute: bool = False
    checkpointing: bool = False
    accumulate: int = 1
    fused_norms: bool = True

    def __post_init__(self) -> None:
        raise_faults("memory plan", self._faults())

    @property
    def tokens(self) -> int:
        """That are trained on at once."""
        return -(-self.rows // self.accumulate) * self.length

    def _faults(self) -> Iterator[str]:
        for name in ("rows", "length", "accumulate"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, expected at least 1"
        if self.accumulate > self.rows:
            yield f"accumulate is {self.accumulate}, expected at most the {self.rows} texts of a step"
        if self.dtype not in NUMBER:
            yield f"dtype is {self.dtype!r}, expected one of {', '.join(NUMBER)}"
        if self.quantize not in QUANTISED:
            yield f"quantize is {self.quantize!r}, expected one of {', '.join(QUANTISED)}"


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a step.

    Attributes:
        base: the frozen model.
        adapter: trained tensors with gradients and moments, and the rows composed of them.
        activations: what autograd keeps of all layers.
        passing: logits with their gradients, or one layer computed again, whichever is larger.
    """

    base: float
    adapter: float
    activations: float
    passing: float

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator reports as its peak."""
        return self.base + self.adapter + self.activations + self.passing

    @property
    def device(self) -> float:
        """What the device has to have: with CUDA's own share, and with what the allocator cannot use."""
        return self.allocated * (1 + SLACK) + CONTEXT


def base_shape(model: nn.Module) -> BaseShape:
    """The shape of a model, which may lie on the meta device.

    Raises:
        ModelError: its config does not tell its width and depth.
    """
    config: Any = getattr(model, "config", None)
    try:
        hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
        heads = int(config.num_attention_heads)
    except (AttributeError, TypeError) as error:
        raise ModelError(f"memory plan: the config of {type(model).__name__} lacks {error}") from error
    each = getattr(config, "head_dim", None) or hidden // heads
    linears = find_linears(model)
    sizes = [linear.in_features * linear.out_features for linear in linears]
    weights = {f"{linear.name}.weight" for linear in linears}  # their number is not that of packed ones
    names = {linear.name.rsplit(".", 1)[-1] for linear in linears}
    return BaseShape(
        linear=sum(sizes),
        other=sum(parameter.numel() for name, parameter in model.named_parameters() if name not in weights),
        largest=max(sizes),
        layers=layers,
        hidden=hidden,
        queries=heads * each,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * each,
        inner=_inner(config, hidden),
        vocabulary=0 if find_head(model) else int(config.vocab_size),
        gated=bool(names & {"gate_proj", "gate_up_proj"}),
    )


def predicted_memory(shape: BaseShape, blueprint: Blueprint, training: Training, clients: int = 1) -> Memory:
    """The memory of one cohort's local steps."""
    number = NUMBER[training.dtype]
    weight = QUANTISED[training.quantize] or number
    recompute = training.recompute and training.quantize == "none"
    layer = kept_of_layer(shape, number, recompute, fused_norms=training.fused_norms)
    passing = _gradients_of_layer(shape, number) + (layer if training.checkpointing else 0)
    unpacked = number * shape.largest if training.quantize != "none" else 0.0
    tokens = clients * training.tokens
    return Memory(
        base=weight * shape.linear + number * shape.other,
        adapter=clients * adapter_bytes(blueprint, number),
        activations=tokens * shape.layers * (number * shape.hidden if training.checkpointing else layer),
        passing=tokens * max(_logits(shape, number), passing) + unpacked,
    )


def fitting_settings(
    shape: BaseShape, blueprint: Blueprint, device_gib: float, rows: int = 4, length: int = 512
) -> list[tuple[Training, Memory]]:
    """Settings with which a step of `rows` texts of `length` tokens fits a device, the fastest first.

    What is tried, from fast to slow: the base as it is, in 8 bits, in 4; everything kept, cheap inputs made
    anew, layers computed again; all texts at once, in pieces. Of those that differ in the number of pieces
    alone, the fewest are named.
    """
    if not device_gib > 0:
        raise_faults("memory plan", [f"--device-memory is {device_gib:g}, expected GiB above 0"])
    found = []
    for quantize, (recompute, checkpointing) in product(QUANTISED, KEEPING):
        if recompute and quantize != "none":
            continue
        for pieces in _pieces(rows):
            training = Training(rows, length, "bfloat16", quantize, recompute, checkpointing, pieces)
            memory = predicted_memory(shape, blueprint, training)
            if memory.device <= device_gib * GIB:
                found.append((training, memory))
                break
    return found


def _inner(config: Any, hidden: int) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 4 * hidden


def _pieces(rows: int) -> list[int]:
    """Numbers of pieces that a step is cut into: 1, 2, 4, ... and one text at a time."""
    doubled = [1 << power for power in range(rows.bit_length()) if 1 << power < rows]
    return [*doubled, rows]


def kept_of_layer(shape: BaseShape, number: int, recompute: bool, *, fused_norms: bool = True) -> float:
    """Bytes a token that autograd keeps of one layer, at `number` bytes a number.

    Attention: the input of its layers (d); q, k, v and the result (2q + 2k). Gated MLP: its input (d), gate,
    act(gate), up and their product (4i). Plain MLP: its input (d), up and act(up) (2i). Each of two norms
    keeps its input (d), in float32 where a Llama's is not fused.

    `recompute` makes anew both inputs that come out of a norm (2d), and that of the last layer (i).
    """
    numbers = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys
    numbers += (4 if shape.gated else 2) * shape.inner
    if recompute:
        numbers -= 2 * shape.hidden + shape.inner
    norm = 4 if shape.gated and not fused_norms else number
    return number * numbers + 2 * norm * shape.hidden


def _gradients_of_layer(shape: BaseShape, number: int) -> float:
    """Bytes a token of the gradients that lie side by side within one layer: of the MLP's widest part."""
    return number * ((3 if shape.gated else 2) * shape.inner + 2 * shape.hidden)


def _logits(shape: BaseShape, number: int) -> float:
    """Bytes a token: the logits, their logarithms in float32, and two gradients of these."""
    return shape.vocabulary * (number + 3 * 4)


def adapter_bytes(blueprint: Blueprint, number: int) -> float:
    """Bytes of one client: parameters, gradients and two moments in float32; the rows that are composed, in
    float32 and in the base's type, with their gradients."""
    dense = sum(_size(shape) for shape in blueprint.dense_shapes.values())
    rows = blueprint.rows * blueprint.vector_length
    chosen = blueprint.topk_shape
    logits = 0 if chosen is None else chosen[0] * min(WIDTH, chosen[2])
    composed = rows * (4 + 2 * number + 4) if chosen is not None else rows * 2 * number
    return 16 * (dense + logits) + 2 * logits + composed


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
