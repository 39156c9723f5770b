"""Cutting updates back to their round's medians."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert kept["c"].examples == 20
    assert norms(kept["c"])["bank"] == pytest.approx(2 * 2.0 * 10 / 20)
    assert kept["c"].dense["bank"][0, 0] < 0
    assert told == {"c": "bank 50 to 2; examples 10000 to 20"}


@given(
    lengths=st.lists(st.floats(0.01, 1e4), min_size=3, max_size=9),
    examples=st.lists(st.integers(1, 1 << 20), min_size=9, max_size=9),
    factor=st.floats(1, 10),
)
def test_nobody_pulls_further_than_the_median_times_the_factor(
    lengths: list[float], examples: list[int], factor: float
):
    updates = {str(n): make(length, examples[n]) for n, length in enumerate(lengths)}
    kept, told = clip_updates(updates, factor)
    most = max(1, int(factor * median(update.examples for update in updates.values())))
    pulls = {n: min(update.examples, most) * norms(update)["bank"] for n, update in updates.items()}
    for name, update in kept.items():
        assert update.examples <= most
        assert update.examples * norms(update)["bank"] <= factor * median(pulls.values()) * (1 + 1e-5)
        assert name in told or update == updates[name]


def test_many_examples_of_a_common_length_are_no_lie():
    updates = {"a": make(1.0, 10), "b": make(1.0, 20), "c": make(1.1, 50)}
    assert clip_updates(updates, 3.0) == (updates, {})


def test_two_updates_have_no_median_to_speak_of():
    updates = {"a": make(1.0), "b": make(1e6)}
    assert clip_updates(updates, 1.0) == (updates, {})


def test_one_that_moves_what_nobody_else_does_has_no_measure():
    """Beside clients that are still: of two that move, the smaller pull holds; one alone moves nothing."""
    still = {name: make(0.0) for name in "ab"}
    kept, told = clip_updates({**still, "liar": make(30.0)}, 2.0)
    assert not kept["liar"].dense["bank"].any()
    assert told == {"liar": "bank 30 to 0"}
    kept, told = clip_updates({**still, "c": make(1.0), "liar": make(30.0)}, 2.0)
    assert norms(kept["liar"])["bank"] == pytest.approx(2.0)
    assert list(told) == ["liar"]


def test_a_section_that_nobody_changes_stays():
    kept, told = clip_updates({name: make(0.0) for name in "abc"}, 1.0)
    assert told == {}
    assert all(not update.dense["bank"].any() for update in kept.values())


def test_clients_that_change_nothing_are_no_part_of_the_median():
    """As those of one label are: with six of ten at 0 the median would be 0, and nobody might move."""
    still = {f"still-{n}": make(0.0) for n in range(6)}
    updates = {**still, **{f"moved-{n}": make(1.0) for n in range(4)}}
    assert clip_updates(updates, 1.0) == (updates, {})
    kept, told = clip_updates({**updates, "liar": make(100.0)}, 1.5)
    assert norms(kept["liar"])["bank"] == pytest.approx(1.5)
    assert list(told) == ["liar"]
