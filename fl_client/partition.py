"""How the training rows are dealt to clients: `auto`, `iid`, `dirichlet:ALPHA`, `by:COLUMN`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fl_client.mixing import mix
from fl_client.tables import Table
from vblora.errors import ConfigError, DataError

__all__ = ["AUTO_ALPHA", "Partition", "parse_partition", "partition"]

Rows = NDArray[np.int64]

AUTO_ALPHA = 0.5  # skewed, yet few clients hold a single label


@dataclass(frozen=True)
class Partition:
    """A parsed specification; `str()` gives the specification back."""

    kind: Literal["auto", "iid", "dirichlet", "by"]
    alpha: float = math.nan  # dirichlet: the smaller, the more the clients differ
    column: str = ""  # by: the column whose values stay whole

    def __str__(self) -> str:
        if self.kind == "dirichlet":
            return f"dirichlet:{self.alpha:g}"
        return f"by:{self.column}" if self.kind == "by" else self.kind


def parse_partition(spec: str) -> Partition:
    """Read `auto`, `iid`, `dirichlet:ALPHA` or `by:COLUMN`.

    Raises:
        ConfigError: none of these, or an alpha that is not a positive number.
    """
    kind, colon, value = spec.partition(":")
    if spec in ("auto", "iid"):
        return Partition("auto" if spec == "auto" else "iid")
    if kind == "dirichlet" and colon:
        try:
            alpha = float(value)
        except ValueError:
            alpha = math.nan
        if not 0 < alpha < math.inf:
            raise ConfigError(
                f"partition {spec!r}: alpha is {value!r}, expected a positive number, as in dirichlet:0.5"
            )
        return Partition("dirichlet", alpha=alpha)
    if kind == "by" and value:
        return Partition("by", column=value)
    raise ConfigError(
        f"partition is {spec!r}, expected auto, iid, dirichlet:ALPHA (as dirichlet:0.5) or by:COLUMN"
    )


def partition(table: Table, spec: str, clients: int, seed: int) -> list[Rows]:
    """Deal every row to exactly one client.

    auto: dirichlet:0.5 where there are labels or groups to deal by, else iid.
    iid: rows, in equal parts.
    dirichlet: the rows of each label, in proportions from Dirichlet(alpha). Where the table has groups they
        stay whole: each goes with its commonest label, then the smallest possible ones move so that no
        client is empty or holds one label only (see `mixing.mix`). A table with groups but no labels
        (causal-lm) is dealt by rows, with the group as the label.
    by: whole groups (`load_corpus(group_column=COLUMN)` put the column there), equally many to each client.

    Args:
        clients: at least 1.
        seed: the same seed gives the same deal, with the same versions of numpy and flwr-datasets.

    Returns:
        For each client its row numbers, sorted, int64, at least one.

    Raises:
        ConfigError: a specification that cannot be read, or no client.
        DataError: a client would be empty, or the table lacks what the specification goes by.
    """
    how = parse_partition(spec)
    if clients < 1:
        raise ConfigError(f"clients is {clients}, expected at least 1")
    if len(table) < clients:
        raise DataError(
            f"partition {how}: client {len(table)} would be empty, {len(table)} examples cannot fill "
            f"{clients} clients; use fewer clients or more examples"
        )
    dealt = [np.sort(np.asarray(part, np.int64)) for part in _deal(table, how, clients, seed)]
    for client, part in enumerate(dealt):
        if not len(part):
            raise DataError(
                f"partition {how}: client {client} of {clients} is empty; "
                "use fewer clients, a larger alpha or more examples"
            )
    return dealt


def _deal(table: Table, how: Partition, clients: int, seed: int) -> list[Rows]:
    # flwr-datasets takes 2.5 s to import: not for those who only check a specification.
    from fl_client import deal

    if how.kind == "auto":
        how = Partition("dirichlet", alpha=AUTO_ALPHA) if table.label or table.group else Partition("iid")
    if how.kind == "iid":
        return deal.deal_iid(len(table), clients, seed)
    if how.kind == "by":
        if table.group is None:
            raise DataError(f"partition {how}: the data has no column {how.column!r} as its group")
        _enough_groups(how, table.group, clients)
        return deal.deal_ids(table.group, clients, seed)
    by = table.label or table.group
    if by is None:
        raise DataError(f"partition {how}: the data has no labels to deal by; use iid or by:COLUMN")
    if table.label is None or table.group is None:
        return deal.deal_dirichlet(by, clients, how.alpha, seed)
    _enough_groups(how, table.group, clients)
    group, label, size = _summarise(table.group, table.label)
    names = [f"{code:08d}" for code in label.tolist()]  # as text, in the order of the numbers
    first = deal.deal_dirichlet(names, clients, how.alpha, seed, redraw=False)
    owner = np.empty(len(label), np.int64)
    for client, groups in enumerate(first):
        owner[groups] = client
    return _rows_by(mix(owner, label, size, clients)[group], clients)


def _enough_groups(how: Partition, group: Sequence[str], clients: int) -> None:
    found = len(set(group))
    if found < clients:
        what = f"values of {how.column!r}" if how.column else "groups (modules), which stay whole,"
        raise DataError(
            f"partition {how}: client {found} would be empty, {found} {what} cannot fill {clients} clients; "
            "use fewer clients, more examples or iid"
        )


def _summarise(groups: Sequence[str], labels: Sequence[str]) -> tuple[Rows, Rows, Rows]:
    """Group of each row (rows,); commonest label, the first of equals, and size of each group (groups,)."""
    group = np.unique(np.asarray(groups, str), return_inverse=True)[1].astype(np.int64)
    names, label = np.unique(np.asarray(labels, str), return_inverse=True)
    pairs, counts = np.unique(group * len(names) + label, return_counts=True)
    pairs = pairs[np.lexsort((-counts, pairs // len(names)))]  # stable: equal counts stay in order of label
    first = np.unique(pairs // len(names), return_index=True)[1]
    return group, pairs[first] % len(names), np.bincount(group).astype(np.int64)


def _rows_by(owner: Rows, clients: int) -> list[Rows]:
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.searchsorted(owner[order], np.arange(1, clients)))
