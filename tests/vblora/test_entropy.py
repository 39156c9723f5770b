"""Whole numbers as a range coder writes them."""

from __future__ import annotations

from contextlib import suppress

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora.entropy import LARGEST, Reader, _model, decode_integers, encode_integers, entropy_bits, varint
from vblora.errors import WireError


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-LARGEST, LARGEST) | st.integers(-40, 40), max_size=300), st.binary(max_size=4))
def test_numbers_come_back_and_what_follows_is_left(numbers, rest):
    array = np.array(numbers, np.int64)
    data = Reader(encode_integers(array) + rest)
    np.testing.assert_array_equal(decode_integers(data, len(numbers)), array)
    assert data.take(len(data)) == rest


@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0, 60.0, 5e4])
def test_blocks_and_size(spread):
    """Within 2% of the entropy, until numbers are so large that most of their bits are noise."""
    numbers = np.rint(np.random.default_rng(0).normal(0, spread, 150_000)).astype(np.int64)
    blob = encode_integers(numbers)
    np.testing.assert_array_equal(decode_integers(Reader(blob), len(numbers)), numbers)
    if spread < 1e3:
        assert 8 * len(blob) <= 1.02 * entropy_bits(numbers) + 8 * 300


def test_beyond_31_bits():
    with pytest.raises(WireError, match="2147483648 is the largest, expected 2147483647 at most"):
        encode_integers(np.array([1 << 31]))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 50))
def test_noise_is_refused_or_read(noise, count):
    with suppress(WireError):
        assert len(decode_integers(Reader(noise), count)) == count


def test_rare_tokens_among_very_many_can_be_coded():
    """The coder knows no probability below 2^-24, and gives a last token that is rarer none."""
    rng, last = np.random.default_rng(1), np.zeros(1, np.int32)
    for _ in range(200):
        rare = rng.integers(1, 4, rng.integers(3, 60))
        model = _model(np.concatenate([[rng.integers(1 << 24, 1 << 25)], rare]))
        last[0] = len(rare)
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(last, model)
        decoder = constriction.stream.queue.RangeDecoder(encoder.get_compressed())
        np.testing.assert_array_equal(decoder.decode(model, 1), last)


@settings(deadline=None)
@given(st.integers(0, (1 << 63) - 1))
def test_varints(number):
    data = Reader(varint(number))
    assert data.varint() == number
    data.finish()


def test_a_reader_takes_no_more_than_there_is():
    with pytest.raises(WireError, match="3 bytes are declared, 2 are left"):
        Reader(b"ab").take(3)
    with pytest.raises(WireError, match="more than 63 bits"):
        Reader(b"\xff" * 12).varint()
    with pytest.raises(WireError, match="2 bytes are left over"):
        Reader(b"ab").finish()
