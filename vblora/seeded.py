"""Initial values that both sides draw instead of sending, equal to the bit on every machine.

Everything comes from a counter-based generator in 64-bit integers: a number depends on (seed, stream, row,
place) alone, so any part can be drawn at any time. No libm function is called; the normal distribution is a
committed table of integers (`quantiles.json`, made by `tests/vblora/make_quantiles.py`).

The initial logits of a row are h normal numbers. They are drawn sorted: `order` says which bank vector stands
at each place of the row, `values` the logit there, strictly falling. Only the first places are ever drawn.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["integers", "order", "uniform", "values"]

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

STREAMS = {"bank": 1, "order": 2, "values": 3, "head": 4, "rows": 5, "theta": 6, "places": 7, "probe": 8}
Stream = Literal["bank", "order", "values", "head", "rows", "theta", "places", "probe"]

FEISTEL_ROUNDS = 6
CHUNK = 1 << 20  # draws held at once: bounds the temporaries to some tens of MB


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64: a bijection of 64-bit words that passes for random."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(seed: int, stream: Stream, index: Ints) -> Words:
    """One key for each index, independent between seeds and streams."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = _mix(np.array([seed], np.uint64) * golden + np.uint64(STREAMS[stream]))
    return _mix(start + (index.astype(np.uint64) + np.uint64(1)) * golden)


def uniform(seed: int, stream: Stream, start: int, count: int, bound: float) -> NDArray[np.float32]:
    """Numbers `start` to `start + count` of a stream, uniform in (-bound, bound) on a grid of 2^24."""
    index = np.arange(start, start + count, dtype=np.int64)
    steps = (_keys(seed, stream, index) >> np.uint64(40)).astype(np.int64)
    centred = (2 * steps - (1 << 24) + 1).astype(np.float32)
    return centred * np.float32(bound * 2.0**-24)


def integers(seed: int, stream: Stream, count: int, below: int) -> NDArray[np.int32]:
    """The first `count` numbers of a stream, even over 0 to below - 1; `below` is at most 2^31."""
    out = np.empty(count, np.int32)
    for start in range(0, count, CHUNK):
        index = np.arange(start, min(count, start + CHUNK), dtype=np.int64)
        out[index] = (_keys(seed, stream, index) >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)
    return out


def order(seed: int, rows: Ints, num_vectors: int, width: int) -> NDArray[np.int32]:
    """Bank vectors at the first `width` places of each row: a keyed permutation of 0..h-1, cut at `width`.

    A Feistel network over the next power of two, walked on until it lands below h.

    Args:
        rows: (n,) row numbers.
        num_vectors: h.
        width: places to draw, at most h.

    Returns:
        (n, width), distinct within a row.
    """
    bits = max(2, (num_vectors - 1).bit_length())
    out = np.empty((len(rows), width), np.int32)
    for part in _chunks(len(rows), width):
        keys = np.repeat(_keys(seed, "order", rows[part]), width)
        place = np.tile(np.arange(width, dtype=np.uint64), len(rows[part]))
        found = _feistel(keys, place, bits)
        while len(beyond := np.flatnonzero(found >= num_vectors)):
            found[beyond] = _feistel(keys[beyond], found[beyond], bits)
        out[part] = found.reshape(-1, width)
    return out


def values(seed: int, rows: Ints, num_vectors: int, width: int, std: float) -> NDArray[np.float32]:
    """The `width` largest of h normal numbers of each row, strictly falling. Shape (n, width).

    With E_i exponential, T_j = sum over i <= j of E_i / (h - i), i from 0, is -log of the j-th largest of h
    uniform numbers.
    """
    left = (num_vectors - np.arange(width)).astype(np.int64)
    out = np.empty((len(rows), width), np.float32)
    for part in _chunks(len(rows), width):
        keys = _keys(seed, "values", rows[part])
        place = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
        draws = (_mix(keys[:, None] + place) >> np.uint64(31)).astype(np.int64) | 1
        times = np.cumsum(_look_up("exponential", draws) // left, axis=1)
        levels = _look_up("normal", np.clip(times, 1, (1 << 46) - 1))
        # Neighbours may fall into one step of the grid; a tie would leave the choice to the device.
        places = np.arange(width)
        levels = np.minimum.accumulate(levels + places, axis=1) - places
        out[part] = levels.astype(np.float32) * np.float32(std * 2.0**-20)
    return out


def _feistel(keys: Words, x: Words, bits: int) -> Words:
    """A keyed bijection of 0..2^bits - 1."""
    right_bits = bits // 2
    widths = [bits - right_bits, right_bits]
    left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
    for turn in range(FEISTEL_ROUNDS):
        mask = np.uint64((1 << widths[turn % 2]) - 1)
        left, right = right, (left ^ _mix(keys + (right << np.uint64(8)) + np.uint64(turn))) & mask
    return (left << np.uint64(right_bits)) | right


def _look_up(table: Literal["exponential", "normal"], x: Ints) -> Ints:
    """Interpolate an octave table at integers x >= 1, in integers."""
    octave = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1
    shift = octave - 6
    fraction = x - (np.int64(1) << octave)
    cell = np.where(shift >= 0, fraction >> np.maximum(shift, 0), fraction << np.maximum(-shift, 0))
    rest = np.where(shift >= 0, fraction & ((np.int64(1) << np.maximum(shift, 0)) - 1), 0)
    flat = _tables()[table]
    at = octave * 65 + cell
    return flat[at] + ((flat[at + 1] - flat[at]) * rest >> np.maximum(shift, 0))


@cache
def _tables() -> dict[str, Ints]:
    text = resources.files("vblora").joinpath("quantiles.json").read_text()
    return {name: np.array(octaves, np.int64).ravel() for name, octaves in json.loads(text).items()}


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(1, CHUNK // max(1, width))
    return [slice(start, start + step) for start in range(0, rows, step)]
