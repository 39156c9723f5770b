"""A study's processes: all items are worked on, and a death costs one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest

from simulations.bench.pool import in_processes
from tests.conftest import ROOT


def number_as(name: str, number: int) -> None:
    os.environ[name] = str(number)


def work(name: str, item: int) -> tuple[int, str]:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 9:
        time.sleep(600)
    return 10 * item, os.environ[name]


def sleep_long(item: int) -> None:
    time.sleep(600)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def found(items: list[int], count: int, seconds: float = 0.0) -> dict[int, tuple[int, str] | None]:
    name = "FEDVB_TEST_NUMBER"
    return dict(in_processes(partial(work, name), items, count, partial(number_as, name), seconds))


def test_a_process_that_is_killed_costs_its_item_alone():
    before = active_children()
    assert found([1, 2, 3], 1) == {1: (10, "0"), 2: None, 3: (30, "0")}
    results = found(list(range(5)), 2)
    assert results.pop(2) is None
    assert {item: value[0] for item, value in results.items() if value} == {0: 0, 1: 10, 3: 30, 4: 40}
    assert {value[1] for value in results.values() if value} <= {"0", "1"}
    assert active_children() == before
    assert found([], 3) == {}


def show_process(number: int) -> None:
    print(os.getpid(), flush=True)


def test_processes_end_with_a_study_that_is_killed():
    """And do not train on, for nobody, until their item is done."""
    code = "from tests.simulations.test_pool import *; list(in_processes(sleep_long, [1], 1, show_process))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        worker = int(study.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        study.kill()
    for _ in range(300):
        if not running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the process was still at work after 30 s")


def test_what_takes_too_long_is_given_up():
    before = active_children()
    assert found([9], 1, seconds=1) == {}
    assert active_children() == before
