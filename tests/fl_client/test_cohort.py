"""Who trains with whom: sizes that fit in memory, clients that fit together; no result changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fl_client.site
from fl_client.batches import padding
from fl_client.cohort import ON_CPU, CohortSizer
from fl_client.serve import Answer, Question, answer
from fl_client.site import Site
from fl_server.rounds import run_rounds
from simulations.direct import DirectExchange
from tests.fl_client.sites import make_site
from tests.fl_server.fakes import make_settings, read_history
from vblora.files import load_state
from vblora.rounding import WIRES
from vblora.state import State

CPU = torch.device("cpu")


def doubled(sizer: CohortSizer, items: Sequence[int], fits: int = 1000) -> tuple[list[int], list[int]]:
    """What `run` yields for twice each item, and the sizes it tried; more than `fits` are out of memory."""
    tried = []

    def work(group: Sequence[int]) -> list[int]:
        tried.append(len(group))
        if len(group) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [2 * item for item in group]

    return list(sizer.run(items, work)), tried


# --- Sizes ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 12))
def test_out_of_memory_halves_the_cohort_and_loses_nothing(count, size, fits):
    sizer = CohortSizer(CPU, size)
    found, tried = doubled(sizer, range(count), fits)
    assert found == [2 * item for item in range(count)]
    assert sum(size for size in tried if size <= fits) == count
    again, tried = doubled(sizer, range(count), fits)
    assert again == found
    assert max(tried, default=0) <= fits, "the smaller size is kept"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 TB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_runs_out_in_several_ways(error, caplog):
    def work(group: Sequence[int]) -> list[int]:
        if len(group) > 2:
            raise error
        return list(group)

    assert list(CohortSizer(CPU, 7).run(range(5), work)) == [0, 1, 2, 3, 4]
    assert caplog.messages == ["out of memory with 5 clients in one forward; going on with 2"]


def test_one_client_that_does_not_fit_and_other_errors_come_out():
    with pytest.raises(torch.OutOfMemoryError):
        doubled(CohortSizer(CPU, 4), range(4), fits=0)

    def broken(group: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(CohortSizer(CPU, 4).run(range(4), broken))


def test_what_a_failed_cohort_held_is_gone_before_the_next_is_tried():
    """The error's frames hold the tensors of what failed."""
    held: list[weakref.ref[Tensors]] = []

    class Tensors:
        pass

    def work(group: Sequence[int]) -> list[int]:
        assert not [reference for reference in held if reference() is not None]
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        if len(group) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return list(group)

    assert list(CohortSizer(CPU, 4).run(range(4), work)) == [0, 1, 2, 3]
    assert len(held) == 6


def test_on_a_gpu_the_first_client_tells_how_many_fit(monkeypatch: pytest.MonkeyPatch):
    """30 MB are allocated before it, 80 MB at most while it trains; 1,000 MB are free after it."""
    calls = []
    told: dict[str, Any] = {
        "reset_peak_memory_stats": None,
        "memory_allocated": 30e6,
        "max_memory_allocated": 80e6,
        "mem_get_info": (1000e6, 2000e6),
        "empty_cache": None,
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: calls.append(name) or value)
    sizer = CohortSizer(torch.device("cuda"))
    found, tried = doubled(sizer, range(40))
    assert found == [2 * item for item in range(40)]
    assert tried == [1, 16, 16, 7]  # 0.8 of 1,000 MB are 16 times 50 MB
    assert calls.index("empty_cache") < calls.index("mem_get_info")
    assert doubled(sizer, range(3))[1] == [3]
    for free, expected in ((10e6, [1, 1, 1]), (1e15, [1, 2])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, 1e15))
        assert doubled(CohortSizer(torch.device("cuda")), range(3))[1] == expected
    assert doubled(CohortSizer(torch.device("cuda")), range(600))[1] == [1, 256, 256, 87]


def test_on_a_cpu_only_clients_of_one_length_train_together():
    lengths = [64, 64, 63, 32, 32, 31, 32, 30, 8]

    def tried(sizer: CohortSizer) -> list[int]:
        sizes = []

        def work(group: Sequence[int]) -> list[int]:
            sizes.append(len(group))
            return list(group)

        assert list(sizer.run(lengths, work, lambda group: len(group) * max(group) / sum(group))) == lengths
        return sizes

    assert tried(CohortSizer(CPU)) == [3, 4, 1, 1]
    assert tried(CohortSizer(CPU, 5)) == [5, 4], "a size that was asked for is used"
    assert doubled(CohortSizer(CPU), range(10))[1] == [ON_CPU, ON_CPU, 10 - 2 * ON_CPU]
    assert doubled(CohortSizer(torch.device("mps")), range(5))[1] == [ON_CPU, 1], "which tells no free memory"


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([[(8, 32), (8, 30)]], 1.0),
        ([[(8, 32), (8, 32)]] * 3, 1.0),
        ([[(8, 32)], [(8, 16)]], 2 * 8 * 32 / (8 * 48)),
        ([[(8, 32)], [(4, 32)]], 2 * 8 * 32 / (12 * 32)),
        ([[(2, 10), (2, 10)], [(2, 10)]], 2 * 40 / 60),
    ],
)
def test_padding_is_what_a_cohort_computes_over_what_its_clients_have(shapes, expected):
    assert padding([np.array(shape) for shape in shapes]) == pytest.approx(expected)


# --- The clients of a site -----------------------------------------------------------


def test_most_work_comes_first_whatever_the_order_of_asking():
    site = make_site(8)
    ordered = site.by_work(range(8), 3)
    assert sorted(ordered) == list(range(8))
    shapes = site._shapes(dict.fromkeys(range(8), 4), 3)
    assert {shape.shape for shape in shapes.values()} == {(4, 2)}
    work = [tuple(shapes[client].sum(axis=0).tolist()) for client in ordered]
    assert work == sorted(work, reverse=True)
    assert site.by_work(reversed(range(8)), 3) == ordered


def test_clients_that_drop_out_have_no_work():
    site = make_site(8, dropout=0.5, stragglers=0.5)
    ordered = site.by_work(range(8), 1)
    steps = [site.fate(1, client).steps for client in ordered]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 0 < steps[0]


# --- Cohorts change no result --------------------------------------------------------


def run(site: Site, out: Path, reverse: bool = False, wire: str = "default") -> State:
    """Three rounds in which all eight clients take part."""
    site = replace(site, settings=replace(site.settings, wire=WIRES[wire]))

    def answers(questions: Sequence[Question]) -> list[Answer]:
        found = list(answer(site, questions[::-1] if reverse else questions))
        return found[::-1] if reverse else found

    options = {"rounds": 3, "clients": 8, "clients_per_round": 8, "eval_every": 3}
    run_rounds(DirectExchange(answers, 8), make_settings(out, wire=WIRES[wire], **options))
    return load_state(out / "adapter" / "adapter.safetensors")[0]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_eight_uneven_clients_in_cohorts_of_any_size_give_one_state(family, tmp_path):
    """In float64, where only the order of sums differs: see `tests.fl_client.test_train.make_model`.

    Lossless: a number between two steps of the wire's grid may be rounded to either.
    """
    site = make_site(8, family=family, stragglers=0.4)
    states = {
        size: run(replace(site, sizer=CohortSizer(CPU, size)), tmp_path / str(size), wire="lossless")
        for size in (1, 3, 8, 0)
    }
    for size in (3, 8, 0):
        for name, expected in states[1].dense.items():
            np.testing.assert_allclose(states[size].dense[name], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(states[size].topk.positions, states[1].topk.positions)
        np.testing.assert_allclose(states[size].topk.gaps, states[1].topk.gaps, rtol=0, atol=1e-4)


def test_the_order_of_clients_does_not_change_a_bit(tmp_path):
    site = replace(make_site(8), sizer=CohortSizer(CPU, 3))
    forth, back = run(site, tmp_path / "forth"), run(site, tmp_path / "back", reverse=True)
    assert forth.digest == back.digest
    assert read_history(tmp_path / "forth") == read_history(tmp_path / "back")


def test_a_round_that_runs_out_of_memory_ends_in_the_same_state(tmp_path, monkeypatch):
    whole = run(replace(make_site(8), sizer=CohortSizer(CPU, 2)), tmp_path / "whole")
    train_cohort = fl_client.site.train_cohort

    def tight(model: Any, task: Any, state: Any, jobs: Any, *others: Any, **options: Any) -> Any:
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return train_cohort(model, task, state, jobs, *others, **options)

    monkeypatch.setattr(fl_client.site, "train_cohort", tight)
    halved = run(replace(make_site(8), sizer=CohortSizer(CPU, 8)), tmp_path / "halved")
    assert halved.digest == whole.digest
