"""The two layers that an adapted model is made of. They own no parameters: factors are bound before use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vblora.errors import ModelError
from vblora.factors import Factors
from vblora.lowrank import adapted
from vblora.recompute import maker

__all__ = ["AdaptedLinear", "HeadLinear", "SharedInput"]


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus the low-rank path of C clients: `y = W x + s B A x`.

    The input's first axis holds the clients' batches one after another, (C * n, ..., in); each client's part
    meets its own factors. Without bound factors it is the frozen layer.

    Attributes:
        base: the frozen layer, any module from (..., in) to (..., out).
        scaling: s, 1 for VB-LoRA.
        is_plain: whether the base is a frozen `nn.Linear`, whose product goes into one node with the rest.
        shared, place: what holds its factors, alone or with others, and which of them it is.
    """

    def __init__(self, base: nn.Module, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.is_plain = type(base) is nn.Linear and not base.weight.requires_grad
        self.place = 0
        self.shared = SharedInput([self])

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self.shared.factors is None:
            y: Tensor = self.base(x)
            return y
        return self.shared.output(self.place, x)


class SharedInput:
    """Layers that are given the same input, such as q, k and v: the first that is called computes all.

    Which layers these are is guessed from their names. Where one turns out to be given another input than the
    first (k and v of an attention to another text), each is computed by itself from then on.

    Attributes:
        layers: in the order in which the model calls them; one alone may be of any kind.
        factors: A of all layers (C, R, in) and each B transposed (C, r, out), in the base's compute dtype.
        recompute: whether the input is made anew in the backward pass where that is cheap, and not kept.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], recompute: bool = False) -> None:
        self.layers = tuple(layers)
        self.factors: Factors | None = None
        self.recompute = recompute
        bases: list[Any] = [layer.base for layer in layers]
        self._plain = all(layer.is_plain for layer in layers)
        self._frozen = [[base.weight for base in bases], [base.bias for base in bases]] if self._plain else []
        self._together = len(layers) > 1
        self._input: Tensor | None = None  # what `_ahead` was computed from
        self._ahead: list[Tensor] = []  # outputs of the layers that are still to be called, the last first
        for place, layer in enumerate(layers):
            layer.shared, layer.place = self, place

    def bind(self, factors: Factors | None) -> None:
        """Take new factors, or None to be the frozen layers; forget what was computed ahead."""
        self.factors, self._input, self._ahead = factors, None, []

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output (C * n, ..., out) of one layer.

        Raises:
            ModelError: x is no batch of all clients, but of something that they share.
        """
        assert self.factors is not None
        if x.shape[0] % (clients := len(self.factors[0])):
            raise ModelError(
                f"a layer of {x.shape[-1]} inputs is given {x.shape[0]} rows for {clients} clients, as some "
                "of DeBERTa are for positions: clients cannot share a forward of this model; use --cohort 1"
            )
        if not self._together:
            return self._alone(place, x)
        if place == 0:
            ys = self._computed(x)
            self._input, self._ahead = x, [*ys[:0:-1]]
            return ys[0]
        if x is self._input and place == len(self.layers) - len(self._ahead):
            y = self._ahead.pop()
            if not self._ahead:
                self._input = None
            return y
        self._together, self._input, self._ahead = False, None, []
        return self._alone(place, x)

    def _alone(self, place: int, x: Tensor) -> Tensor:
        if self._plain:
            return self._computed(x, None if len(self.layers) == 1 else place)[0]
        assert self.factors is not None
        (a, (b,)), layer = self.factors, self.layers[place]
        flat = layer.base(x).reshape(len(a), -1, b.shape[-1])
        inner = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.transpose(1, 2))
        return torch.baddbmm(flat, inner, b, alpha=layer.scaling).view(*x.shape[:-1], b.shape[-1])

    def _computed(self, x: Tensor, place: int | None = None) -> tuple[Tensor, ...]:
        """Outputs of all layers, or of one of them."""
        assert self.factors is not None
        (a, bs), (weights, biases) = self.factors, self._frozen
        if place is not None:
            rank, one = bs[0].shape[1], slice(place, place + 1)
            a, bs = a[:, place * rank : (place + 1) * rank], bs[one]
            weights, biases = weights[one], biases[one]
        again = maker(x) if self.recompute else None
        return adapted(x, a, bs, weights, biases, self.layers[0].scaling, again)


class HeadLinear(nn.Module):
    """A linear layer of the task head with its own weights for each of C clients.

    Attributes:
        base: the layer it stands for; its shapes are used, its values are not.
        tensors: weight (C, out, in) and bias (C, out) or None.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.tensors: tuple[Tensor, Tensor | None] | None = None

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.tensors is None:
            y: Tensor = self.base(x)
            return y
        weight, bias = self.tensors
        clients = len(weight)
        if clients == 1:
            return functional.linear(x, weight[0], None if bias is None else bias[0])
        y = torch.bmm(x.reshape(clients, -1, x.shape[-1]), weight.transpose(1, 2))
        if bias is not None:
            y = y + bias.unsqueeze(1)
        return y.view(*x.shape[:-1], weight.shape[1])
