"""Every row goes to one client, the same one for the same seed, and no client goes empty-handed."""

import subprocess
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_client.deal import deal_dirichlet
from fl_client.mixing import mix
from fl_client.partition import Partition, parse_partition, partition
from fl_client.tables import Table
from vblora.errors import ConfigError, DataError

Rows = NDArray[np.int64]


def _table(rows: int, labels: int = 4, groups: int = 0, seed: int = 0) -> Table:
    """Random labels; with groups, rows of a group share its label."""
    draw = np.random.default_rng(seed)
    if groups:
        group = np.concatenate([np.arange(groups), draw.integers(0, groups, rows - groups)])
        label = group % labels
    else:
        group, label = None, draw.integers(0, labels, rows)
    return Table(
        [f"row {row}" for row in range(rows)],
        label=[f"label {number}" for number in label],
        group=None if group is None else [f"group {number}" for number in group],
    )


def _check_whole(parts: list[Rows], rows: int, clients: int) -> None:
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


def _same(first: list[Rows], second: list[Rows]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def _check_groups_whole(parts: list[Rows], group: list[str]) -> None:
    held = [{group[row] for row in part} for part in parts]
    assert sum(map(len, held)) == len(set(group))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 2**31 - 1))
def test_iid_is_equal_parts(clients: int, more: int, seed: int) -> None:
    table = _table(clients + more)
    parts = partition(table, "iid", clients, seed)
    _check_whole(parts, len(table), clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert _same(parts, partition(table, "iid", clients, seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.floats(0.3, 50), st.integers(0, 2**31 - 1))
def test_dirichlet_deals_every_row(clients: int, alpha: float, seed: int) -> None:
    table = _table(400, labels=6, seed=seed)
    parts = partition(table, f"dirichlet:{alpha}", clients, seed)
    _check_whole(parts, len(table), clients)
    assert _same(parts, partition(table, f"dirichlet:{alpha}", clients, seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10), st.floats(0.01, 50), st.integers(2, 5), st.integers(0, 2**31 - 1))
def test_dirichlet_keeps_groups_and_mixes_labels(clients: int, alpha: float, labels: int, seed: int) -> None:
    table = _table(300, labels, groups=2 * labels * clients, seed=seed)
    parts = partition(table, f"dirichlet:{alpha}", clients, seed)
    _check_whole(parts, len(table), clients)
    assert table.group is not None
    assert table.label is not None
    _check_groups_whole(parts, table.group)
    assert min(len({table.label[row] for row in part}) for part in parts) >= 2
    assert _same(parts, partition(table, f"dirichlet:{alpha}", clients, seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 2**31 - 1))
def test_by_column_keeps_ids_whole(clients: int, more: int, seed: int) -> None:
    table = _table(80, groups=clients + more)
    parts = partition(table, "by:ward", clients, seed)
    _check_whole(parts, len(table), clients)
    assert table.group is not None
    _check_groups_whole(parts, table.group)
    ids = [len({table.group[row] for row in part}) for part in parts]
    assert max(ids) - min(ids) <= 1
    assert _same(parts, partition(table, "by:ward", clients, seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 40), st.integers(0, 2**31 - 1))
def test_mix_helps_everyone_where_groups_suffice(clients: int, labels: int, more: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    enough = np.repeat(np.arange(labels), 2 * clients)
    label = np.concatenate([enough, draw.integers(0, labels, more)])
    size = draw.integers(1, 50, len(label))
    owner = draw.integers(0, draw.integers(1, clients + 1), len(label))  # the last clients may have nothing
    mixed = mix(owner, label, size, clients)
    assert min(len(set(label[mixed == client])) for client in range(clients)) >= 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 20), st.integers(0, 2**31 - 1))
def test_mix_fills_everyone_and_takes_no_second_label(
    clients: int, labels: int, more: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    label = draw.integers(0, labels, clients + more)
    size = draw.integers(1, 50, len(label))
    owner = draw.integers(0, clients, len(label))
    mixed = mix(owner, label, size, clients)
    assert set(mixed) == set(range(clients))

    def single(owners: Rows) -> int:
        return sum(len(set(label[owners == client])) <= 1 for client in range(clients))

    if len(set(owner)) == clients:
        assert single(mixed) <= single(owner)


def test_mix_leaves_a_good_deal_alone() -> None:
    owner = np.array([0, 0, 1, 1, 2, 2])
    label = np.array([0, 1, 0, 1, 1, 0])
    assert np.array_equal(mix(owner, label, np.ones(6, np.int64), 3), owner)


def test_mix_moves_the_smallest_group_of_the_richest_client() -> None:
    owner = np.array([0, 0, 0, 1, 1, 1, 2])
    label = np.array([0, 1, 1, 0, 1, 1, 0])
    size = np.array([50, 9, 7, 20, 3, 2, 5])
    assert mix(owner, label, size, 3).tolist() == [0, 0, 2, 1, 1, 1, 2]


def test_dirichlet_is_flwr_datasets_own() -> None:
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    table = _table(2000)
    own = DirichletPartitioner(
        num_partitions=7, partition_by="label", alpha=0.5, min_partition_size=1, seed=3, shuffle=False
    )
    own.dataset = datasets.Dataset.from_dict({"row": range(2000), "label": table.label})
    parts = partition(table, "dirichlet:0.5", 7, 3)
    assert all(parts[client].tolist() == sorted(own.load_partition(client)["row"]) for client in range(7))


def test_an_unlucky_draw_is_drawn_again() -> None:
    table = _table(120, labels=2)
    parts = [partition(table, "dirichlet:0.4", 8, seed) for seed in range(12)]
    assert all(min(map(len, dealt)) >= 1 for dealt in parts)
    first = [deal_dirichlet(table.label or [], 8, 0.4, seed, redraw=False) for seed in range(12)]
    assert any(min(map(len, dealt)) == 0 for dealt in first)


def test_seeds_differ() -> None:
    table = _table(200, groups=40)
    for spec in ("iid", "dirichlet:0.5", "by:ward"):
        assert not _same(partition(table, spec, 4, 0), partition(table, spec, 4, 1))


def test_alpha_sets_how_much_clients_differ() -> None:
    table = _table(4000, labels=2)
    spread = {
        alpha: np.std([len(part) for part in partition(table, f"dirichlet:{alpha}", 8, 0)])
        for alpha in ("0.5", "100")
    }
    assert spread["0.5"] > 3 * spread["100"]


def test_groups_without_labels_are_dealt_by_rows() -> None:
    labelled = _table(400, groups=5)
    table = Table(labelled.text, group=labelled.group)
    parts = partition(table, "dirichlet:1", 8, 0)
    _check_whole(parts, 400, 8)


def test_a_group_goes_with_its_commonest_label() -> None:
    table = Table(
        [str(row) for row in range(80)],
        label=[("x", "x", "y", "z")[row % 4] for row in range(80)],
        group=[f"g{row // 4}" for row in range(80)],
    )
    parts = partition(table, "dirichlet:1", 4, 0)
    assert all(len(part) % 4 == 0 for part in parts)
    _check_whole(parts, 80, 4)


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("iid", Partition("iid")),
        ("dirichlet:0.5", Partition("dirichlet", alpha=0.5)),
        ("dirichlet:1", Partition("dirichlet", alpha=1.0)),
        ("by:hospital", Partition("by", column="hospital")),
        ("by:a:b", Partition("by", column="a:b")),
    ],
)
def test_specifications(spec: str, parsed: Partition) -> None:
    found = parse_partition(spec)
    assert (found.kind, found.column, str(found)) == (parsed.kind, parsed.column, spec)
    if parsed.kind == "dirichlet":
        assert found.alpha == parsed.alpha


@pytest.mark.parametrize("spec", ["", "IID", "iid:3", "dirichlet", "by:", "by", "random", ":"])
def test_unknown_specifications(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"expected auto, iid, dirichlet:ALPHA .* or by:COLUMN"):
        partition(_table(10), spec, 2, 0)


@pytest.mark.parametrize("alpha", ["", "0", "-1", "nan", "inf", "much"])
def test_alpha_must_be_positive(alpha: str) -> None:
    with pytest.raises(ConfigError, match=f"alpha is '{alpha}', expected a positive number"):
        parse_partition(f"dirichlet:{alpha}")


def test_checking_a_specification_needs_no_data_library() -> None:
    code = (
        "import sys; from fl_client.partition import parse_partition; parse_partition('iid'); "
        "assert 'flwr_datasets' not in sys.modules and 'flwr' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_dealt_is_said() -> None:
    with pytest.raises(ConfigError, match="clients is 0, expected at least 1"):
        partition(_table(10), "iid", 0, 0)
    with pytest.raises(
        DataError, match="partition iid: client 3 would be empty, 3 examples cannot fill 5 cli"
    ):
        partition(_table(3), "iid", 5, 0)
    with pytest.raises(DataError, match="by:ward: client 4 would be empty, 4 values of 'ward' cannot fill 5"):
        partition(_table(30, groups=4), "by:ward", 5, 0)
    with pytest.raises(DataError, match=r"dirichlet:1: client 4 would be empty, 4 groups .* cannot fill 5"):
        partition(_table(30, groups=4), "dirichlet:1", 5, 0)
    with pytest.raises(DataError, match="by:ward: the data has no column 'ward' as its group"):
        partition(_table(10), "by:ward", 2, 0)
    with pytest.raises(DataError, match="dirichlet:1: the data has no labels to deal by; use iid or by:COL"):
        partition(Table(["a", "b"]), "dirichlet:1", 2, 0)


@pytest.mark.parametrize("seed", range(5))
def test_two_labels_at_alpha_a_tenth_fill_twenty_clients(seed: int) -> None:
    """One draw in 36 leaves no client empty."""
    parts = partition(_table(16_000, labels=2), "dirichlet:0.1", 20, seed)
    _check_whole(parts, 16_000, 20)


def test_an_empty_client_is_named_without_noise(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            DataError, match=r"client \d+ of 50 is empty; use fewer clients, a larger alpha or"
        ):
            partition(_table(60), "dirichlet:0.01", 50, 0)
        partition(_table(60, groups=10), "by:ward", 5, 0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("spec", ["iid", "by:ward", "dirichlet:0.5"])
def test_ten_thousand_clients_take_seconds(spec: str) -> None:
    table = _table(60_000, labels=10, groups=30_000)
    start = time.perf_counter()
    parts = partition(table, spec, 10_000, 0)
    assert time.perf_counter() - start < 30  # about 2 s on an idle core
    _check_whole(parts, 60_000, 10_000)
    assert Counter(map(len, parts)).total() == 10_000


def test_auto_deals_by_labels_where_there_are_any() -> None:
    labelled = Table(text=[str(n) for n in range(60)], label=[str(n % 3) for n in range(60)])
    same = zip(partition(labelled, "auto", 3, 0), partition(labelled, "dirichlet:0.5", 3, 0), strict=True)
    assert all(np.array_equal(one, other) for one, other in same)
    plain = Table(text=[str(n) for n in range(60)])
    assert [len(part) for part in partition(plain, "auto", 3, 0)] == [20, 20, 20]
