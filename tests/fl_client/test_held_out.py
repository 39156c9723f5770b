"""Own held-out rows follow the training rows, kind by kind."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.held_out import deal_held_out
from fl_client.tables import Table


def make_table(labels: list[str], groups: list[str] | None = None) -> Table:
    return Table([f"row {row}" for row in range(len(labels))], label=labels, group=groups)


def random_labels(count: int, kinds: int, seed: int) -> list[str]:
    return [f"label {number}" for number in np.random.default_rng(seed).integers(0, kinds, count)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 80), st.integers(1, 5), st.integers(0, 99))
def test_every_row_has_one_client_and_each_label_its_share(clients: int, rows: int, kinds: int, seed: int):
    train, test = (
        make_table(random_labels(200, kinds, seed)),
        make_table(random_labels(rows, kinds, seed + 1)),
    )
    owner = np.random.default_rng(seed).integers(0, clients, 200)
    parts = [np.flatnonzero(owner == client) for client in range(clients)]
    own = deal_held_out(train, parts, test, seed)
    assert [part.dtype for part in own] == [np.int64] * clients
    assert all((np.diff(part) > 0).all() for part in own)
    assert train.label is not None
    assert test.label is not None
    taught = [row for row in range(rows) if test.label[row] in set(train.label)]
    assert np.sort(np.concatenate(own)).tolist() == taught
    for label in set(test.label) & set(train.label):
        there = test.label.count(label)
        for part, mine in zip(parts, own, strict=True):
            share = sum(train.label[row] == label for row in part) / train.label.count(label)
            assert abs(sum(test.label[row] == label for row in mine) - share * there) < 1


def test_groups_go_to_whom_they_belong():
    train = make_table(["a"] * 6, ["x", "x", "y", "z", "z", "y"])
    test = make_table(["a"] * 5, ["z", "x", "new", "y", "x"])
    parts = [np.array([0, 1]), np.array([2, 3, 4, 5])]
    own = deal_held_out(train, parts, test, 0, by_group=True)
    assert [part.tolist() for part in own] == [[1, 4], [0, 3]]


def test_a_site_alone_owns_all_and_a_missing_column_leaves_nobody_with_any():
    train, test = make_table(["a", "b"], ["x", "y"]), make_table(["b", "a", "b"])
    assert deal_held_out(train, [np.arange(2)], test, 0)[0].tolist() == [0, 1, 2]
    assert deal_held_out(train, [np.arange(2)], test, 0, by_group=True)[0].tolist() == []


def test_texts_without_labels_are_dealt_evenly_and_by_the_seed():
    train, test = Table(["one"] * 40), Table(["two"] * 20)
    parts = np.split(np.arange(40), 4)
    first, again, other = (deal_held_out(train, parts, test, seed) for seed in (3, 3, 4))
    assert [len(part) for part in first] == [5] * 4
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]
