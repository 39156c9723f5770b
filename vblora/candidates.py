"""Compacted logits: of each row's h logits only those that can take part, exactly.

Untouched logits keep their seeded values, and these fall strictly along the row's seeded order. So beyond
some place p (`reach`) every logit is a seeded one, and while p + k <= W the k largest of the first W places
are the k largest of all h. One step touches at most k new places of a row, the next ones of its order. Hence:
ask every `CHECK_EVERY` steps whether a row is short of room, and a dense (S, h) is never built. An answer is
read when the question is asked again, so that nothing waits for the device: there is room until then.

All logits lie in one flat tensor (C, N): first W0 places of every row, then the further places of the few
rows that outgrew them, appended as they grow. The flat index of a logit is its slot. The order is the same
for all clients of a cohort.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vblora.anchors import anchored
from vblora.spec import VBLoRASpec
from vblora.start import Order, SeededOrder
from vblora.state import TopK

__all__ = ["CHECK_EVERY", "Candidates", "Selection"]

WIDTH = 64
GROWTH = 4
CHECK_EVERY = 4

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Selection:
    """The k largest logits of every row, largest first; ties go to the lower place.

    Attributes:
        places: (C, S, k) int64, places in the row's seeded order.
        slots: (C, S, k) int64, the same as indices into the flat logits.
    """

    places: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Tier:
    """Rows that outgrew the first width: rows (n,) int64; slots (n, W) int64 of their first W places."""

    rows: Tensor
    slots: Tensor


class Candidates:
    """Which logits are held, for all rows of one adapter.

    Args:
        spec: of the adapter.
        rows: S.
        device: of the logits.
        width: places held of every row at first.
        places: the order of each row; None is the seeded one.

    Attributes:
        width: W0, places held of every row.
        order: (N,) int16 or int32, the bank vector that each slot scores.
        reach: (S,) int64, places of a row from which on every logit of every client is a seeded one.
    """

    def __init__(
        self,
        spec: VBLoRASpec,
        rows: int,
        device: torch.device,
        width: int = WIDTH,
        places: Order | None = None,
    ) -> None:
        self.spec = spec
        self._places = places or SeededOrder(spec.seed, spec.num_vectors, spec.init_std)
        self.rows = rows
        self._slack = spec.topk * (2 * CHECK_EVERY + 1)  # until the answer is read, one more for `start`
        self.width = min(spec.num_vectors, max(width, self._slack + spec.topk))
        everything = np.arange(rows)
        self.order = self._drawn_order(everything, slice(0, self.width)).to(device)
        self._seeds = self._places.logits(everything, self.width)
        self._tiers: list[Tier] = []
        self._firsts = torch.arange(0, rows * self.width, self.width, device=device).view(1, -1, 1)
        self.reach = torch.zeros(rows, dtype=torch.int64, device=device)
        self._limits = self._reach_limits()
        self._short = Answer(device)

    def start(self, *selections: TopK) -> Tensor:
        """Logits (C, N) float32 that stand for C selections: the seeds, the chosen k lifted above the others.

        The lowest chosen logit comes to `margin` above the best that is not chosen, or keeps its seed where
        that is higher; the gaps place the others above it. Places beyond the chosen keep their seeds, which
        keeps the order exact. Logits from an earlier start are void.
        """
        device = self.order.device
        self.order, self._tiers = self.order[: self.rows * self.width], []
        furthest = np.max([topk.positions.max(axis=1) for topk in selections], axis=0)
        self.reach = torch.from_numpy(furthest.astype(np.int64) + 1).to(device)
        self._limits = self._reach_limits()
        seeds = torch.from_numpy(self._seeds.copy()).flatten().to(device)
        logits = torch.cat([seeds, *self._grow_now()]).repeat(len(selections), 1)
        self._short.forget()
        for flat, topk in zip(logits, selections, strict=True):
            slots = self._slots_of(torch.from_numpy(topk.positions.astype(np.int64)).to(device))
            chosen = anchored(self.spec, self._seeds, topk, keep=self._places.exact)
            flat[slots] = torch.from_numpy(chosen).to(device)
        return logits

    def select(self, logits: Tensor) -> Selection:
        """Choose the k largest of each row. logits: (C, N), any float dtype. Not differentiable.

        A row that holds a NaN names place 0 k times: it makes no row grow, and no check lets it pass.
        """
        logits = logits.detach()
        clients, first = len(logits), self.rows * self.width
        if logits.shape[1] != len(self.order):
            raise ValueError(
                f"logits have {logits.shape[1]} slots, expected {len(self.order)}: another start?"
            )
        places = _largest(logits[:, :first].view(clients, self.rows, self.width), self.spec.topk)
        slots = places + self._firsts
        for tier in self._tiers:
            found = _largest(logits[:, tier.slots], self.spec.topk)
            places[:, tier.rows] = found
            slots[:, tier.rows] = tier.slots.expand(clients, -1, -1).gather(2, found)
        torch.maximum(self.reach, places.amax(dim=(0, 2)) + 1, out=self.reach)
        return Selection(places, slots)

    def grow(self) -> list[Tensor]:
        """Make room where a row is short of it. Call it every `CHECK_EVERY` selections, or sooner.

        What is read is what the device found at the last call: there is room for the selections between.

        Returns:
            Seeded logits (n,) to append to the flat logits, in order; empty where nothing grew. Optimiser
            moments of appended logits are zero: what they would be had the logits been there all along.
        """
        appended = self._grow_now() if self._short.read() else []
        self._short.ask((self.reach > self._limits).any())
        return appended

    def _grow_now(self) -> list[Tensor]:
        appended = []
        while len(rows := (self.reach > self._limits).nonzero().flatten()):
            widths = self._widths()[rows]
            for width in sorted(set(widths.tolist())):
                appended.append(self._widen(rows[widths == width], width))
            self._limits = self._reach_limits()
        return appended

    def _widths(self) -> Tensor:
        """(S,) places held of each row."""
        widths = torch.full_like(self.reach, self.width)
        for tier in self._tiers:
            widths[tier.rows] = tier.slots.shape[1]
        return widths

    def _reach_limits(self) -> Tensor:
        """(S,) how far each row may reach with the places that it holds."""
        widths = self._widths()
        return torch.where(widths < self.spec.num_vectors, widths - self._slack, self.spec.num_vectors)

    def _widen(self, rows: Tensor, width: int) -> Tensor:
        """Move rows of one width to the next; give the seeds of their new places."""
        spec, device = self.spec, self.order.device
        wider = min(spec.num_vectors, width * GROWTH)
        held = self._slots_of(torch.arange(width, device=device).expand(len(rows), -1), rows)
        fresh = torch.arange(len(rows) * (wider - width), device=device).view(len(rows), -1) + len(self.order)
        kept = [(tier, ~torch.isin(tier.rows, rows)) for tier in self._tiers]
        self._tiers = [Tier(t.rows[keep], t.slots[keep]) for t, keep in kept if keep.any()]
        self._tiers.append(Tier(rows, torch.cat([held, fresh], dim=1)))
        names = rows.cpu().numpy()
        self.order = torch.cat([self.order, self._drawn_order(names, slice(width, wider)).to(device)])
        seeds = self._places.logits(names, wider)[:, width:]
        return torch.from_numpy(seeds.copy()).flatten().to(device)

    def _drawn_order(self, rows: NDArray[np.int64], places: slice) -> Tensor:
        """Bank vectors at `places` of `rows`, flat, in as few bytes as h allows."""
        drawn = self._places.vectors(rows, places.stop)[:, places]
        kind = np.int16 if self.spec.num_vectors <= 1 << 15 else np.int32
        return torch.from_numpy(drawn.astype(kind)).flatten()

    def _slots_of(self, places: Tensor, rows: Tensor | None = None) -> Tensor:
        """(n, m) slots of places (n, m) of `rows` (all rows when None)."""
        numbers = torch.arange(self.rows, device=places.device) if rows is None else rows
        slots = places + numbers.view(-1, 1) * self.width
        for tier in self._tiers:
            where = torch.full((self.rows,), -1, dtype=torch.int64, device=places.device)
            where[tier.rows] = torch.arange(len(tier.rows), device=places.device)
            inside = (where[numbers] >= 0).nonzero().flatten()
            slots[inside] = tier.slots[where[numbers[inside]]].gather(1, places[inside])
        return slots


class Answer:
    """A truth that the device finds out, read later without waiting for what it was asked since."""

    def __init__(self, device: torch.device) -> None:
        self._host = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def ask(self, truth: Tensor) -> None:
        self._host.copy_(truth, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> bool:
        """The last truth asked for; False if none was."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)

    def forget(self) -> None:
        self.read()
        self._host.zero_()


def _largest(values: Tensor, k: int) -> Tensor:
    """(..., k) places of the k largest along the last axis, largest first, ties to the lower place.

    `torch.topk` promises nothing about ties; `max` names the first of them, on every device.
    """
    values = values.clone()
    found = []
    for _ in range(k):
        best, place = values.max(dim=-1, keepdim=True)
        place.masked_fill_(best.isnan(), 0)
        values.scatter_(-1, place, -torch.inf)
        found.append(place)
    return torch.cat(found, dim=-1)
