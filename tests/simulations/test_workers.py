"""Several processes at one simulation give the run that one gives, and a death among them ends it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import torch

from fl_client.cohort import ON_CPU
from fl_client.opening import open_site
from fl_client.serve import Answer, Question
from fl_client.settings import SiteSettings
from fl_client.site import Site
from fl_server.observer import LogObserver
from simulations.processes import PATIENCE
from simulations.simulate import simulate
from simulations.workers import Answers, Helpers, Workers, count_workers
from tests.conftest import ROOT
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


# --- Errors that end a run ------------------------------------------------------------

LONG = 200.0  # seconds, which nobody should wait for
QUESTION = Question(0, "train")


def asleep(piece: Sequence[Question]) -> Iterator[Answer]:
    time.sleep(LONG)
    yield Answer(0)


def killed(piece: Sequence[Question]) -> Iterator[Answer]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield Answer(0)


def idle(piece: Sequence[Question]) -> Iterator[Answer]:
    time.sleep(1)  # leaves pieces to the others
    yield Answer(0)


def broken(piece: Sequence[Question]) -> Iterator[Answer]:
    time.sleep(1)
    raise RuntimeError("CUDA error")
    yield Answer(0)


def interrupted(piece: Sequence[Question]) -> Iterator[Answer]:
    time.sleep(1)
    signal.raise_signal(signal.SIGINT)
    yield Answer(0)


def opened(way: Answers) -> Answers:
    """What a helper's opener returns."""
    return way


@pytest.mark.parametrize(
    ("own", "theirs", "error", "told"),
    [
        (idle, [asleep, killed], RunError, "a worker process died"),
        (broken, [asleep, asleep], RuntimeError, "CUDA error"),
        (interrupted, [asleep], KeyboardInterrupt, None),
    ],
)
def test_an_error_does_not_wait_for_those_who_are_busy(
    own: Answers, theirs: list[Answers], error: type[BaseException], told: str | None
):
    started = time.monotonic()
    with closing(Helpers([partial(opened, way) for way in theirs])) as helpers:
        with pytest.raises(error, match=told):
            list(helpers.answer(own, [[QUESTION]] * 3))
        assert time.monotonic() - started < LONG
        with pytest.raises(RunError, match="a worker process died"):
            list(helpers.answer(idle, [[QUESTION]] * 3))
    assert time.monotonic() - started < LONG


def test_a_run_that_ends_in_an_error_does_not_wait_either():
    workers = Workers.__new__(Workers)
    workers._helpers = Helpers([partial(opened, asleep)] * 2)
    started = time.monotonic()
    answers = workers._helpers.answer(idle, [[QUESTION]] * 3)
    next(answers)
    workers.__exit__(KeyError, KeyError("in the server's part of the round"), None)
    assert time.monotonic() - started < PATIENCE
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < LONG


def test_what_cannot_be_sent_to_a_helper_comes_out():
    with closing(Helpers([partial(opened, idle)])) as helpers, pytest.raises(AttributeError, match="pickle"):
        list(helpers.answer(idle, [[lambda: None]] * 3))  # type: ignore[list-item]


STARTING = """
import time
from simulations.workers import Helpers

helpers = Helpers([print] * 2)
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    helpers.close()
    print("interrupted")
"""


def test_an_interrupt_while_helpers_start_is_silent():
    """A terminal sends it to all of them."""
    command = [sys.executable, "-c", STARTING]
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "started\n"
        time.sleep(1)  # they import
        os.killpg(started.pid, signal.SIGINT)
        out, err = started.communicate(timeout=60)
    assert (started.returncode, out, err) == (0, "interrupted\n", "")


def holding(piece: Sequence[Question]) -> Iterator[Answer]:
    """As tqdm does: a lock between processes, which is to be taken away at the end."""
    kept = get_context("spawn").Lock()
    yield Answer(7)
    time.sleep(LONG)
    del kept


TERMINATING = """
from contextlib import closing, suppress
from functools import partial
from tests.simulations.test_workers import QUESTION, Helpers, holding, idle, opened

with closing(Helpers([partial(opened, holding)])) as helpers, suppress(RuntimeError):
    answers = helpers.answer(idle, [[QUESTION]] * 60)
    for answer in answers:
        if answer.client == 7:
            answers.throw(RuntimeError("in the run"))
print("ended")
"""


def test_helpers_that_are_ended_leave_nothing_to_clean_up():
    command = [sys.executable, "-c", TERMINATING]
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT) as ended:
        out, err = ended.communicate(timeout=100)
    assert (ended.returncode, out, err) == (0, "ended\n", "")


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
