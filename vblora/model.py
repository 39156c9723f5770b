"""Put an adapter into a base model: find the layers, describe them, run the model with C clients' tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vblora.errors import ModelError
from vblora.factors import Cutter
from vblora.layers import AdaptedLinear, HeadLinear, SharedInput
from vblora.rows import stack
from vblora.sources import row_source
from vblora.spec import Blueprint, HeadTensor, Linear
from vblora.state import State
from vblora.weights import dense_weight, keep_unpacked

__all__ = ["AdaptedModel", "adaptable_linears", "describe_base", "find_head", "find_linears", "fits_base"]

ALL_LINEAR = "all-linear"

# Names of layers that one module gives the same input, in the order of its calls.
SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
Layer = TypeVar("Layer", bound=nn.Module)
Bound = list[tuple[Tensor, int]]  # tensors and their versions


def find_linears(base: nn.Module, targets: str = ALL_LINEAR) -> tuple[Linear, ...]:
    """The layers to adapt, in the model's own order.

    Args:
        base: the model.
        targets: "all-linear" (every linear layer but the head and the output embedding), or names separated
            by commas; a name fits a layer that is called so or ends in it after a dot, as in PEFT.

    Raises:
        ModelError: a name fits no linear layer, or all are asked for where some belong to experts.
    """
    found = adaptable_linears(base)
    known = ", ".join(sorted({linear.name.rsplit(".", 1)[-1] for linear in found}))
    if targets == ALL_LINEAR and (experts := _experts(base)):
        name, kind = next(iter(experts.items()))
        what = (
            "the weights of several experts, each of which sees tokens of its own"
            if _named_experts(name)
            else "weights on three axes (several experts?)"
        )
        raise ModelError(
            f"--target-modules all-linear: {name} ({kind}) holds {what}; these cannot be adapted: "
            f"name others, of {known}"
        )
    if targets == ALL_LINEAR:
        return found
    wanted = [target.strip() for target in targets.split(",") if target.strip()]
    for target in wanted:
        if not any(_fits(linear.name, target) for linear in found):
            raise ModelError(f"--target-modules: {target!r} fits no linear layer; the base has {known}")
    return tuple(linear for linear in found if any(_fits(linear.name, target) for target in wanted))


def adaptable_linears(base: nn.Module) -> tuple[Linear, ...]:
    """Every layer that can be adapted, in the model's own order: no head, output embedding or expert."""
    experts = _experts(base)
    excluded = {id(module) for module in _head_modules(base).values()}
    if callable(getattr(base, "get_output_embeddings", None)):
        excluded.add(id(base.get_output_embeddings()))  # type: ignore[operator]
    return tuple(
        Linear(name, *sides)
        for name, module in base.named_modules()
        if (sides := _sides(module)) and id(module) not in excluded and not _inside(name, experts)
    )


def find_head(base: nn.Module) -> tuple[HeadTensor, ...]:
    """The tensors outside the pretrained trunk that a task trains, such as a classifier's.

    Raises:
        ModelError: a head that is not made of linear layers.
    """
    tensors = []
    for name, module in _head_modules(base).items():
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"task head: {name} is a {type(module).__name__}; "
                "only linear layers can be trained beside the adapter"
            )
        tensors += [
            HeadTensor(f"{name}.{key}", tuple(value.shape))
            for key, value in module.named_parameters(recurse=False)
        ]
    return tuple(tensors)


def describe_base(base: nn.Module) -> str:
    """What kind of base this is, the same wherever its files lie: architecture, width, depth, vocabulary."""
    config = getattr(base, "config", None)
    if config is None:
        return type(base).__name__
    parts = [
        getattr(config, key, None) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    ]
    return "-".join(str(part) for part in parts if part is not None)


class AdaptedModel:
    """A frozen base with an adapter in place, run with the tensors of C clients at once.

    The base's modules are wrapped where they stand; its own parameters are frozen and never change.

    Args:
        base: the model.
        blueprint: what its tensors mean.
        recompute: keep no input of an adapted layer that the backward pass can make from what autograd keeps
            for the base anyway (outputs of norms, silu * up): less memory, a few more products a step.

    Raises:
        ModelError: the base lacks a layer that the blueprint names, or has it in another size.

    Attributes:
        base: the wrapped model, in evaluation mode (dropout off).
        blueprint: what the tensors mean.
        source: makes rows from tensors.
    """

    def __init__(self, base: nn.Module, blueprint: Blueprint, *, recompute: bool = False) -> None:
        fits_base(base, blueprint)
        keep_unpacked(base)
        self.base = base.eval().requires_grad_(False)
        config: Any = getattr(base, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # nobody asks for the keys of a batch again
        self.blueprint = blueprint
        parameter = next(base.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        self.source = row_source(blueprint, self.device, lambda name: dense_weight(base.get_submodule(name)))
        layers = [
            _replace(
                base, linear.name, AdaptedLinear(base.get_submodule(linear.name), blueprint.spec.scaling)
            )
            for linear in blueprint.linears
        ]
        groups = list(_sharing(blueprint.linears, [layer.is_plain for layer in layers]))
        self._inputs = [SharedInput([layers[place] for place in group], recompute) for group in groups]
        self._cutter = Cutter(blueprint, groups, self.device)
        self._bound: Bound | None = None  # tensors that were bound without gradients
        self._heads = {
            name: _replace(base, name, HeadLinear(base.get_submodule(name)))  # type: ignore[arg-type]
            for name in dict.fromkeys(tensor.name.rsplit(".", 1)[0] for tensor in blueprint.head)
        }

    def load(self, *states: State) -> dict[str, Tensor]:
        """Leaf tensors (C, ...) of C clients, each starting from its own state: the source's, and `head`.

        They void those of the last call.
        """
        tensors = self.source.load(*states)
        if self.blueprint.head_size:
            tensors["head"] = stack([state.dense["head"] for state in states], self.device)
        return tensors

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Compose all rows once and hand each layer its factors; gradients flow back to `tensors`.

        Without gradients, what is bound already stays until a tensor changes: a loop that predicts may bind
        before each batch.
        """
        bound = None
        if not torch.is_grad_enabled():
            bound = [(tensor, tensor._version) for tensor in tensors.values()]
            if _same(bound, self._bound):
                return
        self.attach(self.compose(tensors))
        self._bound = bound

    def compose(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What layers are made of: `rows` (C, S, b), and `head` where there is one; differentiable."""
        composed = {"rows": self.source.rows(tensors)}
        if self.blueprint.head_size:
            composed["head"] = tensors["head"]
        return composed

    def attach(self, composed: Mapping[str, Tensor]) -> None:
        """Cut what was composed and hand each layer its part; gradients flow back to `composed`."""
        factors = self._cutter.cut(composed["rows"], self.dtype)
        for shared, own in zip(self._inputs, factors, strict=True):
            shared.bind(own)
        if self.blueprint.head_size:
            self._bind_head(composed["head"].to(self.dtype))
        self._bound = None

    def unbind(self) -> None:
        """Forget the factors: the model is the frozen base again, and the graph behind them is freed."""
        self._bound = None
        for shared in self._inputs:
            shared.bind(None)
        for head in self._heads.values():
            head.tensors = None

    def __call__(self, **inputs: Any) -> Any:
        """Run the base with the bound factors. Inputs are the clients' batches end to end, (C * n, ...)."""
        return self.base(**inputs)

    def _bind_head(self, flat: Tensor) -> None:
        sizes = [tensor.size for tensor in self.blueprint.head]
        pieces = torch.split(flat, sizes, dim=1)
        bound: dict[str, dict[str, Tensor]] = {}
        for tensor, piece in zip(self.blueprint.head, pieces, strict=True):
            layer, key = tensor.name.rsplit(".", 1)
            bound.setdefault(layer, {})[key] = piece.view(-1, *tensor.shape)
        for layer, values in bound.items():
            self._heads[layer].tensors = values["weight"], values.get("bias")


def fits_base(base: nn.Module, blueprint: Blueprint) -> None:
    """See that a base has the layers that a blueprint names.

    Raises:
        ModelError: it lacks some, or has them in another size, or by a second name too.
    """
    if faults := list(_misfits(base, blueprint)):
        raise ModelError("base model does not fit the adapter: " + "; ".join(faults))


def _same(bound: Bound, last: Bound | None) -> bool:
    """Whether two bindings are of the same tensors, unchanged."""
    return last is not None and [(id(one), at) for one, at in bound] == [(id(one), at) for one, at in last]


def _misfits(base: nn.Module, blueprint: Blueprint) -> Iterator[str]:
    """What the blueprint names and the base has not, layer by layer."""
    modules = dict(base.named_modules(remove_duplicate=False))
    names = Counter(id(module) for module in modules.values())
    for linear in blueprint.linears:
        found = _sides(modules[linear.name]) if linear.name in modules else None
        if found != (linear.in_features, linear.out_features):
            what = f"{found[0]} to {found[1]}" if found else "no linear layer"
            yield f"{linear.name} is {what}, expected {linear.in_features} to {linear.out_features}"
        elif names[id(module := modules[linear.name])] > 1:
            tied = next(name for name, other in modules.items() if other is module and name != linear.name)
            yield f"{linear.name} is tied: {tied} is the same layer; leave it out of --target-modules"
    parameters = dict(base.named_parameters())
    for tensor in blueprint.head:
        shape = tuple(parameters[tensor.name].shape) if tensor.name in parameters else None
        if shape != tensor.shape:
            yield f"head tensor {tensor.name} has shape {shape}, expected {tensor.shape}"


def _sharing(linears: Sequence[Linear], plain: Sequence[bool]) -> Iterator[list[int]]:
    """Places of layers that are given one input, by their names; most are alone."""
    group = [0]
    for place in range(1, len(linears)):
        known = (linears[group[0]], linears[group[-1]])
        if plain[group[0]] and plain[place] and _share(*known, linears[place]):
            group.append(place)
        else:
            yield group
            group = [place]
    yield group


def _share(first: Linear, last: Linear, linear: Linear) -> bool:
    """Whether `linear` follows `last` among layers that share an input, whose first is `first`."""
    names = [one.name.rpartition(".") for one in (first, last, linear)]
    if len({parent for parent, _, _ in names}) > 1 or first.in_features != linear.in_features:
        return False
    _, before, own = (child for _, _, child in names)
    return any((before, own) in pairwise(family) for family in SHARING)


def _sides(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, or None. GPT-2's Conv1D holds its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)
    return None


def _experts(base: nn.Module) -> dict[str, str]:
    """Modules that hold the weights of experts, fused on a third axis or one by one, and their class."""
    found = {}
    for name, module in base.named_modules():
        several = any(
            parameter.dim() == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False)
        )
        fused = several and not isinstance(module, nn.modules.conv._ConvNd)
        if fused or _named_experts(name):
            found[name] = type(module).__name__
    return found


def _named_experts(name: str) -> bool:
    return name.rpartition(".")[2] == "experts"


def _inside(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(module + ".") for module in outer)


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _head_modules(base: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters of their own outside the trunk, where a model is a trunk with a task head."""
    prefix = getattr(base, "base_model_prefix", "")
    if not prefix or not hasattr(base, prefix) or not hasattr(getattr(base, "config", None), "num_labels"):
        return {}
    if not type(base).__name__.endswith("ForSequenceClassification"):
        return {}
    return dict(_outside(base, prefix))


def _outside(base: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in base.named_modules():
        inside = not name or name == prefix or name.startswith(prefix + ".")
        if not inside and list(module.parameters(recurse=False)):
            yield name, module


def _replace(base: nn.Module, name: str, module: Layer) -> Layer:
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, module)
    return module
