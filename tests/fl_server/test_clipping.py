"""Cutting updates back to their round's medians."""

from __future__ import annotations

import numpy as np
import pytest

from fl_server.clipping import clip_updates, norms
from vblora.state import Update


def make(length: float, examples: int = 10) -> Update:
    bank = np.zeros((4, 4), np.float32)
    bank[0, 0] = length
    return Update(0, bytes(16), examples, {"bank": bank, "head": np.zeros(3, np.float32)}, None)


def test_only_what_is_too_long_is_scaled():
    updates = {"a": make(1.0), "b": make(2.0), "c": make(-50.0, 10_000)}
    kept, told = clip_updates(updates, 2.0)
    assert (kept["a"], kept["b"]) == (updates["a"], updates["b"])
    assert norms(kept["c"])["bank"] == pytest.approx(4.0)
    assert kept["c"].dense["bank"][0, 0] < 0
    assert kept["c"].examples == 20
    assert told == {"c": "bank 50 to 4; examples 10000 to 20"}


def test_two_updates_have_no_median_to_speak_of():
    updates = {"a": make(1.0), "b": make(1e6)}
    assert clip_updates(updates, 1.0) == (updates, {})


def test_a_section_that_nobody_changes_stays():
    kept, told = clip_updates({name: make(0.0) for name in "abc"}, 1.0)
    assert told == {}
    assert all(not update.dense["bank"].any() for update in kept.values())
