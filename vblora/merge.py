"""An adapter made part of the base's own weights, `W + s B A`: then nothing of the adapter is needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vblora.errors import ModelError
from vblora.model import fits_base
from vblora.sources import row_source
from vblora.spec import Blueprint
from vblora.state import State
from vblora.weights import dense_weight, set_dense_weight

__all__ = ["composed_rows", "merge"]

CPU = torch.device("cpu")


@torch.no_grad()
def composed_rows(state: State, blueprint: Blueprint, base: nn.Module | None = None) -> Tensor:
    """(S, b) rows of a state, float32 on the CPU. LoRA-XS asks for the base, which must not be adapted.

    Raises:
        ModelError: LoRA-XS without a base.
    """

    def weights(name: str) -> Tensor:
        if base is None:
            raise ModelError(f"adapter {blueprint.spec.kind}: its factors are those of the base; name it")
        return dense_weight(base.get_submodule(name)).to(CPU)

    source = row_source(blueprint, CPU, weights)
    return source.rows(source.load(state))[0].detach()


@torch.no_grad()
def merge(base: nn.Module, state: State, blueprint: Blueprint) -> None:
    """Add an adapter's products to the weights of `base`, where they stand, and put its head in.

    Products are added in float32 and rounded once to the weight's dtype; a quantised layer becomes dense.

    Raises:
        ModelError: the base does not fit the adapter, or an adapted layer shares its weight with another.
    """
    fits_base(base, blueprint)
    _require_untied(base, blueprint)
    rank, scaling = blueprint.spec.rank, blueprint.spec.scaling
    rows = composed_rows(state, blueprint, base)
    for part in blueprint.slices:
        linear = part.linear
        a = rows[part.start : part.middle].reshape(rank, -1)[:, : linear.in_features]
        b = rows[part.middle : part.stop].reshape(rank, -1)[:, : linear.out_features]
        weight = dense_weight(base.get_submodule(linear.name))
        change = scaling * (b.T @ a).to(weight.device)
        set_dense_weight(base, linear.name, (weight.float() + change).to(weight.dtype))
    start, flat = 0, state.dense.get("head")
    for tensor in blueprint.head:
        assert flat is not None
        parameter = base.get_parameter(tensor.name)
        parameter.copy_(torch.from_numpy(flat[start : start + tensor.size]).view(tensor.shape))
        start += tensor.size


def _require_untied(base: nn.Module, blueprint: Blueprint) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for linear in blueprint.linears:
        names = owners.get(id(base.get_submodule(linear.name).weight), [])
        if len(names) > 1:
            raise ModelError(
                f"merge: {linear.name} shares its weight with {', '.join(names[1:])}, which it would change; "
                "export the adapter with --format lora"
            )
