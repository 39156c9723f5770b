"""Several processes at one simulation give the run that one gives, and a death among them ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_client.cohort import ON_CPU
from fl_client.opening import open_site
from fl_client.serve import Question
from fl_client.settings import SiteSettings
from fl_client.site import Site
from fl_server.observer import LogObserver
from simulations.simulate import simulate
from simulations.workers import Workers, count_workers
from tests.fl_client.sites import make_site
from tests.simulations.conftest import read_history, small_config
from vblora.errors import ConfigError, RunError, WireError
from vblora.spec import Blueprint
from vblora.state import initial_state
from vblora.wire import decode_update, encode_state

CPU = torch.device("cpu")


def questions(site: Site, clients: Sequence[int], damage: bytes = b"") -> list[Question]:
    blob = encode_state(initial_state(site.blueprint), site.blueprint) + damage
    return [Question(client, "train", blob, {"round": 1, "lr-scale": 1.0}) for client in clients]


# --- How many, and who gets what -----------------------------------------------------


def test_one_process_unless_asked_and_one_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_workers(0, CPU) == 1
    assert count_workers(3, CPU) == 3
    assert count_workers(0, torch.device("cuda")) == 4
    assert count_workers(0, torch.device("cuda:1")) == 1
    assert count_workers(2, torch.device("cuda")) == 2
    assert count_workers(3, torch.device("cuda:1")) == 3
    with pytest.raises(ConfigError, match="--workers: 4 asked for, there are 3 GPUs from cuda:1"):
        count_workers(4, torch.device("cuda:1"))


def pieces(site: Site, count: int, clients: int) -> list[list[int]]:
    pool = Workers(site, 1)
    pool._count = count
    return [
        [question.client for question in piece] for piece in pool._pieces(questions(site, range(clients)))
    ]


def test_on_a_cpu_pieces_are_cohorts_and_become_smaller_towards_the_end():
    site = make_site(50)
    found = pieces(site, 2, 50)
    assert [client for piece in found for client in piece] == site.by_work(range(50), 1)
    sizes = [len(piece) for piece in found]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-4:]) == (ON_CPU, [1, 1, 1, 1])
    assert [len(piece) for piece in pieces(site, 2, 3)] == [1, 1, 1]


def test_on_gpus_shares_are_even_in_work():
    site = make_site(10)
    on_gpu = replace(site, model=_Elsewhere(site.blueprint))
    ordered = site.by_work(range(10), 1)
    pool = Workers.__new__(Workers)
    pool._site, pool._count = on_gpu, 4
    asked = questions(site, range(10))
    found = [[question.client for question in piece] for piece in pool._pieces(asked)]
    assert found == [ordered[at::4] for at in range(4)]
    pool._site = replace(on_gpu, settings=replace(site.settings, cohort=3))
    assert [len(piece) for piece in pool._pieces(asked)] == [3, 3, 3, 1]


class _Elsewhere:
    device = torch.device("cuda")

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint


# --- Answers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tiny_bert: Path, topics: Path) -> Iterator[Workers]:
    config = small_config(tiny_bert, topics, Path("unused"), clients=8, cohort=1)
    with Workers(open_site(SiteSettings.from_run_config(config)), 2) as workers:
        yield workers


def trained(pool: Workers, clients: Sequence[int]) -> dict[int, bytes]:
    answers = list(pool.answer(questions(pool._site, clients)))
    found = {item.client: item.blob for item in answers}
    assert sorted(found) == sorted(clients)
    assert len(found) == len(answers)
    return found


def test_two_processes_answer_as_one_does(pool: Workers):
    alone = Workers(pool._site, 1)
    assert trained(pool, range(8)) == trained(alone, range(8))
    for blob in trained(pool, [3]).values():
        assert decode_update(blob, pool._site.blueprint).examples == 12
    assert list(pool.answer([])) == []


def test_what_is_left_after_an_error_or_a_break_reaches_nobody(pool: Workers):
    for _ in range(3):
        with pytest.raises(WireError):
            list(pool.answer(questions(pool._site, range(8), b"?")))
        trained(pool, [5, 2])
        stopped = pool.answer(questions(pool._site, range(8)))
        next(iter(stopped))
        stopped.close()  # type: ignore[attr-defined]
        trained(pool, [7, 1, 0])


# --- Runs ----------------------------------------------------------------------------


def test_a_run_with_two_processes_has_the_history_of_one(
    pool: Workers, tiny_bert: Path, topics: Path, tmp_path: Path
):
    changes = {"clients": 8, "clients_per_round": 6, "stragglers": 0.3, "dropout": 0.2}
    for workers in (1, 2):
        config = small_config(tiny_bert, topics, tmp_path / f"alone-{workers}", cohort=1, **changes)
        simulate(config | {"workers": workers})
    assert read_history(tmp_path / "alone-1") == read_history(tmp_path / "alone-2")


def test_a_process_that_is_killed_ends_the_run_and_the_run_can_go_on(
    tiny_bert: Path, topics: Path, finished: Path, tmp_path: Path
):
    class Killing(LogObserver):
        def round_started(self, number: int, clients: Sequence[str]) -> None:
            if number == 2:
                (child,) = (process for process in active_children() if process not in before)
                os.kill(child.pid or 0, signal.SIGKILL)

    before = active_children()
    config: dict[str, Any] = small_config(tiny_bert, topics, tmp_path / "run", cohort=1)
    with pytest.raises(RunError, match="a worker process died"):
        simulate(config | {"workers": 2}, Killing())
    assert [record["round"] for record in read_history(tmp_path / "run")] == [0, 1]
    simulate({**config, "resume": True})
    assert read_history(tmp_path / "run")[-1]["round"] == 3
