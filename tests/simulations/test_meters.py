"""Speed and memory as they are shown."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from simulations import meters
from simulations.meters import Memory, Pace, rate, resident


def test_pace_is_of_the_round_at_work_and_its_mean_leaves_evaluation_out(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 12.0, 14.0, 100.0, 101.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    pace = Pace()
    assert pace.now == pace.mean == 0
    pace.round_started()
    pace.reply_received()
    pace.reply_received()
    assert pace.now == pace.mean == pytest.approx(0.5)
    pace.round_started()
    assert pace.now == pytest.approx(0.5)
    pace.reply_received()
    assert pace.now == pytest.approx(1.0)
    assert pace.mean == pytest.approx(3 / 5)


def test_rates_for_people():
    assert [rate(count) for count in (0.0123, 1.2345, 123.45, 12345.6)] == ["0.0123", "1.23", "123", "12,346"]


def test_memory_counts_helper_processes():
    before = resident()
    assert 1e7 < before < 1e11
    helper = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    helper.start()
    try:
        assert resident() > before
        assert os.getpid() != helper.pid
    finally:
        helper.terminate()
        helper.join()


def test_memory_is_looked_at_once_a_second(monkeypatch: pytest.MonkeyPatch):
    sizes = iter([3_000_000, 2_000_000])
    clock = iter([100.0, 100.0, 100.5, 101.5, 101.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(meters, "resident", lambda: next(sizes))
    monkeypatch.setattr(meters, "_gpu_peak", lambda: 5_000_000_000)
    memory = Memory()
    for _ in range(3):
        memory.look()
    assert memory.now == "2.0 MB, GPU 5.00 GB"
    assert memory.most == "3.0 MB, GPU 5.00 GB"
