"""Selections as differences: they come back to the bit, and sets cost what their number says."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora.errors import WireError
from vblora.gaps import GAPS
from vblora.selection import decode_selection, encode_selection, round_selection
from vblora.state import TopK


def drawn(rng: np.random.Generator, rows: int, k: int, h: int) -> TopK:
    positions = np.argsort(rng.random((rows, h)), axis=1)[:, :k].astype(np.int32)
    return TopK(positions, np.sort(rng.exponential(0.5, (rows, k - 1)), axis=1).astype(np.float32))


def mixed(rng: np.random.Generator, base: TopK, h: int) -> TopK:
    """Some rows as they were, some with other gaps, some turned round, some chosen anew."""
    rows, k = base.positions.shape
    other = drawn(rng, rows, k, h)
    fate = rng.integers(0, 4, (rows, 1))
    positions = np.where(
        fate == 3, other.positions, np.where(fate == 2, base.positions[:, ::-1], base.positions)
    )
    return TopK(positions, np.where(fate == 0, base.gaps, other.gaps))


def equal(one: TopK, other: TopK) -> bool:
    return all(
        np.array_equal(a.view(np.uint32), b.view(np.uint32))
        for a, b in ((one.positions, other.positions), (one.gaps, other.gaps))
    )


shapes = st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(0, 12), st.integers(0, 1 << 20))


@settings(deadline=None, max_examples=150)
@given(shapes)
def test_exact_gaps_come_back_to_the_bit(shape):
    rows, k, more, seed = shape
    rng, h = np.random.default_rng(seed), k + more
    base = drawn(rng, rows, k, h)
    topk = mixed(rng, base, h)
    if k > 1:
        topk.gaps[0, 0] = rng.choice([np.nan, np.inf, -0.0, 1.0])
    assert equal(decode_selection(encode_selection(topk, base, h), base, h), topk)


def test_no_move_leads_from_minus_zero_to_zero():
    base = TopK(np.array([[0, 1], [3, 2]], np.int32), np.array([[-0.0], [0.5]], np.float32))
    topk = TopK(base.positions, np.array([[0.0], [0.75]], np.float32))
    assert equal(decode_selection(encode_selection(topk, base, 6), base, 6), topk)


@settings(deadline=None, max_examples=150)
@given(shapes, st.sampled_from([0, 2, 6]), st.booleans())
def test_rounded_gaps_come_back_to_the_bit(shape, exponent, on_values):
    """From a base whose gaps are values, and from one whose are not, as version 0's."""
    rows, k, more, seed = shape
    rng, h = np.random.default_rng(seed), k + more
    base = drawn(rng, rows, k, h)
    if on_values:
        base = round_selection(base, TopK(base.positions, np.zeros_like(base.gaps)), 0, rng)
    exact = mixed(rng, base, h)
    topk = round_selection(exact, base, exponent, rng)
    blob = encode_selection(topk, base, h)
    assert blob[0] >= exponent
    assert blob[0] != 255
    assert equal(decode_selection(blob, base, h), topk)
    assert np.array_equal(topk.positions[:, 0], exact.positions[:, 0])
    assert np.array_equal(np.sort(topk.positions, axis=1), np.sort(exact.positions, axis=1))
    assert (np.diff(topk.gaps, axis=1) >= 0).all()
    same = exact.same_rows(base)
    assert topk.same_rows(base)[same].all(), "a row that did not change keeps its bits"


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_a_rounded_state_is_told_from_any_earlier_one(shape):
    rows, k, more, seed = shape
    rng, h = np.random.default_rng(seed), k + more
    held = [drawn(rng, rows, k, h)]
    for _ in range(3):
        held.append(round_selection(mixed(rng, held[-1], h), held[-1], 0, rng))
    for base in held[:3]:
        blob = encode_selection(held[3], base, h)
        assert equal(decode_selection(blob, base, h), held[3])
        assert blob[0] != 255


@pytest.mark.parametrize(("rows", "h"), [(91_680, 2048), (23_744, 256), (1_536, 90)])
def test_even_sets_cost_within_three_percent_of_their_number(rows, h):
    """log2 C(h, k) bits a row; here the set alone is told, its first member stands first."""
    rng = np.random.default_rng(0)
    base = TopK(np.tile(np.array([0, 1], np.int32), (rows, 1)), np.zeros((rows, 1), np.float32))
    one = rng.integers(h, size=rows)
    sets = np.sort(np.stack([one, (one + rng.integers(1, h, size=rows)) % h], axis=1), axis=1).astype(
        np.int32
    )
    blob = encode_selection(TopK(sets, base.gaps), base, h)
    assert 8 * len(blob) <= 1.03 * rows * math.log2(math.comb(h, 2)) + 8 * 20
    assert equal(decode_selection(blob, base, h), TopK(sets, base.gaps))


def test_rows_that_stay_cost_almost_nothing():
    rng = np.random.default_rng(0)
    base = drawn(rng, 50_000, 2, 256)
    gaps = base.gaps.copy()
    gaps[:10] = 0.5
    assert len(encode_selection(TopK(base.positions, gaps), base, 256)) < 80


def test_a_diverged_selection_is_left_for_the_receiver_to_see():
    base = drawn(np.random.default_rng(0), 5, 3, 9)
    topk = TopK(base.positions[:, ::-1].copy(), np.full_like(base.gaps, np.nan))
    assert round_selection(topk, base, 2, np.random.default_rng(0)) is topk


@settings(deadline=None, max_examples=300)
@given(st.binary(min_size=1, max_size=60), st.integers(1, 4), st.booleans())
def test_noise_is_refused_or_a_selection(noise, k, full):
    base = drawn(np.random.default_rng(0), 6, k, 7)
    with suppress(WireError):
        found = decode_selection(bytes([255 if full else noise[0] % 7]) + noise[1:], base, 7)
        assert found.positions.shape == base.positions.shape
        assert ((found.positions >= 0) & (found.positions < 7)).all()
        assert (np.diff(np.sort(found.positions, axis=1), axis=1) > 0).all()


def _streams(*numbers: list[int], how: int = 0) -> bytes:
    from vblora.entropy import encode_integers

    return bytes([how]) + b"".join(encode_integers(np.array(stream, np.int64)) for stream in numbers)


@pytest.mark.parametrize(
    ("payload", "fault"),
    [
        (b"\x07", "1 bytes are declared, 0 are left"),
        (_streams([0, 0], [0, 0], how=7), "exponent 7, expected 0 to 6, or 255"),
        (_streams([6, 0]), "a row's fate is 0 to 6, expected 0 to 5"),
        (_streams([-1, 0]), "a row's fate is -1 to 0, expected 0 to 5"),
        (_streams([2, 0]) + b"\0" + _streams([2])[1:], "a number of 2, expected rising ones to 1"),
        (_streams([2, 0]) + b"\1\2", "1 bytes are declared, 0 are left"),
        (_streams([2, 0]) + b"\1\1\0" + _streams([4])[1:], "a number of 4, expected rising ones to 3"),
        (_streams([4, 0]) + b"\1\0" + _streams([3], [1])[1:], "a number of 5, expected rising"),
        (_streams([4, 0]) + b"\1\0" + _streams([3], [-1])[1:], "a number of 3, expected rising"),
        (_streams([4, 0]) + b"\1\1\7", "rank 7, expected 0 to 5"),
        (_streams([4, 0]) + b"\1\2", "told in way 2, expected 0 or 1"),
        (_streams([0, 0], [0, -1]), "a gap of -1 to 0 values is beyond the last"),
        (_streams([0, 0], [0, 131]), "a gap of 0 to 131 values is beyond the last"),
        (_streams([0, 0], [0, 1]) + b"!", "1 bytes are left over"),
        (_streams([0, 0], [0, 3], how=255), "a row that differs or not is 0 to 3"),
        (_streams([0, 0], [0, 1], how=255) + b"123", "4 bytes are declared, 3 are left"),
    ],
)
def test_what_is_no_selection(payload, fault):
    base = TopK(np.array([[0, 1], [3, 2]], np.int32), np.zeros((2, 1), np.float32))
    with pytest.raises(WireError, match=fault):
        decode_selection(payload, base, 6)
    assert GAPS[130] == 21
