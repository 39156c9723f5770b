"""Mend a deal of whole groups, so that no client is empty or holds one label only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["mix"]

Ints = NDArray[np.int64]


class _Hands:
    """What each client holds, kept up to date as groups move."""

    def __init__(self, owner: Ints, label: Ints, size: Ints, clients: int) -> None:
        self.owner, self.label, self.size = owner.copy(), label, size
        self.rows = np.bincount(owner, size, clients).astype(np.int64)  # (clients,)
        self.counts = np.zeros((clients, int(label.max()) + 1), np.int32)  # groups of each label
        np.add.at(self.counts, (owner, label), 1)
        # Labels of which a client can give a group and still hold two labels, if it does now, or one.
        self.spare = np.zeros_like(self.counts, bool)
        self.held: list[list[int]] = [[] for _ in range(clients)]  # groups, the smallest first
        for group in np.lexsort((np.arange(len(size)), size)).tolist():
            self.held[owner[group]].append(group)
        for client in range(clients):
            self._look(client)

    def _look(self, client: int) -> None:
        count = self.counts[client]
        self.spare[client] = (count >= 2) | ((count == 1) & (np.count_nonzero(count) >= 3))

    def move(self, group: int, client: int) -> None:
        """Give a group to a client."""
        for place, sign in ((int(self.owner[group]), -1), (client, 1)):
            self.rows[place] += sign * self.size[group]
            self.counts[place, self.label[group]] += sign
            self._look(place)
        self.held[self.owner[group]].remove(group)
        self.held[client] = sorted([*self.held[client], group], key=lambda held: (self.size[held], held))
        self.owner[group] = client

    def richest(self, able: Any) -> int | None:
        """The client with the most rows among those able to give, a (clients,) mask; the first of equals."""
        return int(np.argmax(np.where(able, self.rows, -1))) if able.any() else None


def mix(owner: Ints, label: Ints, size: Ints, clients: int) -> Ints:
    """Move the smallest possible groups from the richest clients to those that are empty or hold one label
    only.

    No client is empty afterwards if there are as many groups as clients. Each holds two labels if, whichever
    label is left out, at least 2 * clients - 1 groups remain (a client that cannot be helped then would have
    all others holding at most two of them); with fewer groups it is done as far as it goes.

    Args:
        owner: (groups,) client of each group.
        label: (groups,) its label, 0, 1, ...
        size: (groups,) its rows.

    Returns:
        (groups,) the new owners.
    """
    hands = _Hands(owner, label, size, clients)
    for client in np.flatnonzero(hands.counts.sum(1) == 0).tolist():
        donor = hands.richest(hands.counts.sum(1) >= 2)
        if donor is not None:
            hands.move(hands.held[donor][0], client)
    for client in range(clients):
        labels = np.flatnonzero(hands.counts[client])
        if len(labels) != 1:
            continue
        other = hands.spare.copy()
        other[:, labels[0]] = False
        donor = hands.richest(other.any(1))
        if donor is not None:
            group = next(group for group in hands.held[donor] if other[donor, label[group]])
            hands.move(group, client)
    return hands.owner
