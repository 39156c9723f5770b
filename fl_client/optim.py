"""AdamW over the stacked tensors of C clients: each is clipped, slowed, and may stop, by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from vblora.errors import raise_faults

__all__ = ["AdamW", "decay_faults"]


@dataclass
class AdamW:
    """AdamW (arXiv 1711.05101), as `torch.optim.AdamW` computes it, for tensors (C, ...).

    A part of a tensor may share one second moment, the mean of its squares, as in Adam-mini (arXiv
    2406.16793). A head wants that: number by number, Adam moves the weights of a class that a client does not
    have, whose gradients are tiny, as far as those of a class that it has.

    Attributes:
        rates: learning rate by tensor name.
        clip_norm: largest gradient norm of a client over all its tensors; 0 is off.
        weight_decay: of all tensors. A bank and its logits take none: see `decay_faults`.
        shared: sizes of the parts that share a second moment, by the name of a tensor (C, sum of sizes).
    """

    rates: Mapping[str, float]
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    shared: Mapping[str, Sequence[int]] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._step = 0

    @torch.no_grad()
    def step(
        self,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        share: Tensor | None,
        scale: float = 1.0,
    ) -> None:
        """Change `tensors` in place.

        Args:
            tensors: (C, ...) by name.
            gradients: the same shapes.
            share: (C,), of this step, that each client takes: 0 to 1, or whether it does; None for all of it.
                Clients may end early, not start late.
            scale: of all rates in this step.

        Raises:
            ConfigError: there is weight decay, and a tensor that takes none.
        """
        raise_faults("AdamW", decay_faults(self.weight_decay, tensors))
        self._step += 1
        beta1, beta2 = self.betas
        root = (1 - beta2**self._step) ** 0.5
        clipping = self._clip(gradients)
        for name, tensor in tensors.items():
            gradient = gradients[name] if clipping is None else gradients[name] * _as(clipping, tensor)
            if share is not None:  # not by a product: 0 * NaN is NaN
                gradient = torch.where(_as(share, tensor) > 0, gradient, 0.0)
            if name not in self._first:
                self._first[name], self._second[name] = torch.zeros_like(tensor), torch.zeros_like(tensor)
            first, second = self._first[name], self._second[name]
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2)
            if name in self.shared:
                second.add_(_mean_squares(gradient, self.shared[name]), alpha=1 - beta2)
            else:
                second.addcmul_(gradient, gradient, value=1 - beta2)
            rate = scale * self.rates[name]
            if self.weight_decay:
                lost = rate * self.weight_decay
                tensor.mul_(1 - lost if share is None else 1 - lost * _as(share, tensor))
            rate /= 1 - beta1**self._step
            if share is None:
                tensor.addcdiv_(first, (second.sqrt() / root).add_(self.epsilon), value=-rate)
            else:
                change = first / (second.sqrt() / root).add_(self.epsilon)
                tensor.sub_(change * (rate * _as(share, tensor)))

    def widen(self, name: str, count: int) -> None:
        """Append `count` places to the last axis of a tensor's moments: zero, as never touched."""
        for moments in (self._first, self._second):
            if name in moments:
                moments[name] = functional.pad(moments[name], (0, count))

    def _clip(self, gradients: Mapping[str, Tensor]) -> Tensor | None:
        """(C,) factors that bring each client's gradient to the clip norm at most."""
        if not self.clip_norm:
            return None
        squares = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients.values()])
        return (self.clip_norm / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)


def decay_faults(weight_decay: float, names: Iterable[str]) -> Iterator[str]:
    """What weight decay would break: nothing may move but what a gradient moves."""
    if weight_decay and not {"bank", "logits"}.isdisjoint(names):
        yield (
            f"weight-decay is {weight_decay}, expected 0 for an adapter with a bank: a logit that decays "
            "without being chosen leaves the seeded order, and its row would need all h logits again"
        )


def _mean_squares(gradient: Tensor, sizes: Sequence[int]) -> Tensor:
    """(C, n): at each number the mean of the squares of the part that it is in."""
    parts = torch.split(gradient.square(), list(sizes), dim=1)
    return torch.cat([part.mean(dim=1, keepdim=True).expand_as(part) for part in parts], dim=1)


def _as(per_client: Tensor, tensor: Tensor) -> Tensor:
    """(C,) shaped to multiply (C, ...)."""
    return per_client.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)
