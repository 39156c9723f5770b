"""How runs share a machine."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.compare import probe
from simulations.compare.probe import Probe, share_out
from simulations.compare.running import Layout
from simulations.config import default_config

GB = 10**9


def laid_out(
    runs: int, device: str = "cpu", seconds: float = 20.0, at_once: int = 0, **changes: Any
) -> tuple[Layout, float]:
    config = {**default_config(), **{name.replace("_", "-"): value for name, value in changes.items()}}
    found = Probe(device, {}, memory=GB, load=0.0, round=seconds, evaluation=0.0)
    return share_out(found, runs, config, at_once)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, ten gigabytes."""
    monkeypatch.setattr(probe, "cores", lambda: 4)
    monkeypatch.setattr(probe, "_free_memory", lambda: 10.0 * GB)


def test_many_runs_take_a_core_each():
    layout, seconds = laid_out(40)
    assert layout == Layout(4, 1, 1)
    assert seconds == 10 * 200


def test_few_long_runs_are_trained_by_all_cores():
    """Five would leave three cores idle while the last is trained."""
    layout, seconds = laid_out(5)
    assert layout == Layout(1, 4, 1)
    assert seconds < 2 * 200
    assert laid_out(5, seconds=0.5)[0] == Layout(4, 1, 1)  # helpers take seconds to come
    assert laid_out(1, clients_per_round=1)[0] == Layout(1, 1, 4)


def test_what_is_asked_for_is_kept():
    assert laid_out(40, at_once=2)[0] == Layout(2, 2, 1)
    assert laid_out(40, workers=3)[0] == Layout(1, 3, 1)
    assert laid_out(40, workers=1)[0] == Layout(4, 1, 1)
    assert laid_out(3, at_once=8, workers=1)[0] == Layout(3, 1, 1)


def test_memory_bounds_the_runs_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "_free_memory", lambda: 2.6 * GB)
    assert laid_out(40)[0] == Layout(2, 1, 2)
    monkeypatch.setattr(probe, "_free_memory", lambda: 0.5 * GB)
    assert laid_out(40)[0] == Layout(1, 1, 4)


def test_a_gpu_has_one_run_at_a_time():
    layout, seconds = laid_out(6, device="cuda:0")
    assert layout == Layout(1, 0, 4)
    assert seconds == 6 * 200
    assert laid_out(6, device="cuda:0", at_once=3, workers=2)[0] == Layout(3, 2, 1)
