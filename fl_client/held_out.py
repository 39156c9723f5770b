"""Each client's own held-out rows: of the kinds that it trains on, in the same proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_client.tables import Table

__all__ = ["deal_held_out"]

Rows = NDArray[np.int64]

STREAM = 0x0E7  # keeps these draws apart from those that deal the training rows


def deal_held_out(
    train: Table, parts: Sequence[Rows], test: Table, seed: int, *, by_group: bool = False
) -> list[Rows]:
    """Deal held-out rows to clients as the training rows were dealt.

    The rows of one kind (a label; with `by_group` a group; else all rows alike) go to clients in proportion
    to the training rows of that kind which they hold, rounded up or down by chance. So label mixtures agree,
    and the rows of a group go to whom the group belongs. A kind that nobody trains on goes to nobody.

    Args:
        train: rows that were dealt.
        parts: rows of `train` by client.
        test: held-out rows. Where it lacks the group column, nobody has rows of its own.
        seed: of the draw.

    Returns:
        For each client its rows of `test`, sorted, int64; maybe none.
    """
    found, wanted = _kinds(train, by_group), _kinds(test, by_group)
    if found is None or wanted is None:
        return [np.empty(0, np.int64) for _ in parts]
    names, codes = np.unique(np.array([*found, *wanted]), return_inverse=True)
    of_train, of_test = codes[: len(found)], codes[len(found) :]
    counts = np.stack([np.bincount(of_train[part], minlength=len(names)) for part in parts])
    rng = np.random.default_rng((STREAM, seed))
    dealt: list[list[Rows]] = [[] for _ in parts]
    for kind in np.flatnonzero(counts.sum(axis=0)):
        rows = rng.permutation(np.flatnonzero(of_test == kind))
        ends = np.cumsum(counts[:, kind]) / counts[:, kind].sum() * len(rows)
        pieces = np.split(rows, np.floor(ends[:-1] + rng.random()).astype(int))
        for hand, piece in zip(dealt, pieces, strict=True):
            hand.append(piece)
    return [np.sort(np.concatenate(hand)).astype(np.int64) for hand in dealt]


def _kinds(table: Table, by_group: bool) -> Sequence[str] | None:
    """The kind of each row; None where the column that tells it is missing."""
    if by_group:
        return table.group
    return table.label or table.group or [""] * len(table)
