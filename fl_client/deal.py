"""Who gets which row, drawn by flwr-datasets' partitioners."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import datasets
import numpy as np
from flwr_datasets.partitioner import DirichletPartitioner, GroupedNaturalIdPartitioner, IidPartitioner
from numpy.typing import NDArray

__all__ = ["deal_dirichlet", "deal_ids", "deal_iid"]

Rows = NDArray[np.int64]

HOPELESS = 10  # more clients empty at once: a draw that fits everyone is one in e^10, and each takes a second
REDRAWS = 40  # of ten draws each: with two labels, 20 clients and alpha 0.1 one draw in 36 fills everyone

PRIME = 1_000_003  # from one of these seeds to the next


class _Positions(datasets.Dataset):  # type: ignore[misc]  # datasets ships no types
    """A data set whose `select`, which every partitioner ends in, gives the positions themselves.

    A real `select` takes 1 ms to build a data set: 10 s for 10,000 clients.
    """

    def select(self, indices: Sequence[int], *_: Any, **__: Any) -> Rows:
        return np.asarray(indices, np.int64)


def deal_iid(rows: int, clients: int, seed: int) -> list[Rows]:
    """Shuffled rows in equal parts (`IidPartitioner` cuts without shuffling)."""
    order = np.random.default_rng(seed).permutation(rows)
    return [order[part] for part in _load(IidPartitioner(num_partitions=clients), order, clients)]


def deal_dirichlet(
    labels: Sequence[str], clients: int, alpha: float, seed: int, *, redraw: bool = True
) -> list[Rows]:
    """The rows of each label, in proportions drawn from Dirichlet(alpha).

    With `redraw`, `DirichletPartitioner` draws up to ten times more while a client is empty, from this seed
    and then from others that it names. If none of these fits everyone, the first draw stands, empty clients
    and all.
    """

    def draw(least: int, seed: int = seed) -> list[Rows]:
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="key",
            alpha=alpha,
            min_partition_size=least,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
        return _load(partitioner, labels, clients)

    first = draw(0)
    empty = sum(not len(part) for part in first)
    if not redraw or not 0 < empty <= HOPELESS:
        return first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for every draw that left a client empty
        for turn in range(REDRAWS):
            with suppress(ValueError):
                return draw(1, seed + turn * PRIME)
    return first


def deal_ids(ids: Sequence[str], clients: int, seed: int) -> list[Rows]:
    """Whole ids, shuffled, so many to each client that the numbers differ by one at most.

    Needs as many ids as clients.
    """
    names = np.unique(np.asarray(ids, str))
    parts = np.array_split(np.random.default_rng(seed).permutation(names), clients)
    client_of = {name: client for client, part in enumerate(parts) for name in part.tolist()}
    # Groups of one client each: `NaturalIdPartitioner` does the same behind a progress bar.
    partitioner = GroupedNaturalIdPartitioner(partition_by="key", group_size=1, sort_unique_ids=True)
    return _load(partitioner, [client_of[name] for name in ids], clients)


def _load(partitioner: Any, key: Sequence[Any] | Rows, clients: int) -> list[Rows]:
    """All parts that a partitioner makes of rows with these keys."""
    partitioner.dataset = _Positions.from_dict({"key": key})
    return [partitioner.load_partition(client) for client in range(clients)]
