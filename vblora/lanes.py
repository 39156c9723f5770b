"""Many whole numbers of one kind as bytes, coded by how large their neighbours are.

A section is cut, in C order, into lanes (`vblora.trellis.lane_length`). Bank vectors move unevenly, so each
lane has a class, that of its mean size, which travels first. The numbers follow, each by the frequencies of
its context: its class and, along a trellis, whether its state is odd. Frequencies start from a shape that the
class gives, and learn from what was read: class after class, from blocks that double; along a trellis, where
a state is known only from the numbers before it, from every column of the lanes. So no table travels, and a
small section is coded nearly as well as a large one.

Axes: n lanes, L numbers of a lane.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from vblora.entropy import (
    BLOCK,
    FIRST_LARGE,
    LARGEST,
    MAX_TOKENS,
    MOST_COUNTED,
    Reader,
    as_whole,
    decode_integers,
    decode_symbols,
    encode_integers,
    entropy_bits,
    from_tokens,
    plain_runs,
    plain_width,
    to_tokens,
    varint,
)
from vblora.errors import WireError
from vblora.trellis import NEXT, lane_length, walk

__all__ = ["LaneModel", "decode_lanes", "encode_lanes", "lane_classes", "lane_entropy"]

Ints = NDArray[np.int64]
Whole = NDArray[np.int32]
# Writes tokens by a model of them all, or by a family and one row of probabilities each; or reads as many.
Code = Callable[..., Whole]

PLAIN, ALONG = 0, 1  # along the trellis
FIRST_BLOCK = 1 << 8  # numbers of a class that are told before any was learnt
BLOCK_LANES = 512  # lanes coded side by side along the trellis
UNIT_CLASS = 9  # of a mean size of 1; classes are half octaves apart, class 0 is all zeros
MOST_CLASS = UNIT_CLASS + 62
EDGES = 2.0 ** ((np.arange(2, MOST_CLASS + 1) - UNIT_CLASS - 0.5) / 2)  # between the mean sizes of classes
SEEN = 128  # what one number that was read adds to a frequency
LONG_RUN = 1 << 16  # numbers taken from their tokens at once, where no plain bits follow
START = 32 * SEEN  # what the frequencies of a context come to before any was read


def lane_classes(lanes: NDArray[np.floating | np.signedinteger]) -> Ints:
    """(n,) classes of (n, L) numbers: 0 where all are 0, else the mean size in half octaves."""
    mean = np.abs(lanes).mean(axis=1, dtype=np.float64)
    return np.where(mean > 0, 1 + np.searchsorted(EDGES, mean), 0)


def encode_lanes(numbers: NDArray[np.signedinteger | np.floating]) -> bytes:
    """Write whole numbers of any shape, in C order; along the trellis where they follow it."""
    how, lanes, _ = _cut(numbers)
    classes = lane_classes(lanes)
    start = bytes([how]) + encode_integers(classes)
    if not classes.any():
        return start
    told = lanes[_order(how, classes)]
    tokens = to_tokens(told.reshape(-1)).reshape(told.shape)
    alphabet, encoder = int(tokens.max()) + 1, constriction.stream.queue.RangeEncoder()

    def code(symbols: Whole, *model: Any) -> Whole:
        encoder.encode(symbols, *model)
        return symbols

    _code(how, classes, numbers.size, tokens, alphabet, code)
    words = encoder.get_compressed()
    return b"".join(
        [
            start,
            varint(alphabet),
            varint(len(words)),
            words.astype("<u4").tobytes(),
            *(plain_runs(told.reshape(-1)) if alphabet > FIRST_LARGE else ()),
        ]
    )


def decode_lanes(data: Reader, count: int) -> Whole:
    """Read `count` numbers. Nothing is allocated beyond twice them, a few blocks, and the bytes at hand.

    Raises:
        WireError: the bytes are not that many numbers.
    """
    length = lane_length(count)
    how, classes = data.take(1)[0], decode_integers(data, -(-count // length))
    if how not in (PLAIN, ALONG) or not ((classes >= 0) & (classes <= MOST_CLASS)).all():
        raise WireError(f"lanes: way {how}, expected 0 or 1, or a class that is not 0 to {MOST_CLASS}")
    if not classes.any():
        return np.zeros(count, np.int32)
    alphabet = data.varint()
    if not 2 <= alphabet <= MAX_TOKENS:
        raise WireError(f"lanes: {alphabet} tokens, expected 2 to {MAX_TOKENS}")
    order, decoder = _order(how, classes), data.range_decoder()
    told = np.zeros((len(order), length), np.int32)  # tokens at first

    def code(symbols: Whole, model: Any, *rows: NDArray[np.float32]) -> Whole:
        return decode_symbols(decoder, model, rows[0] if rows else len(symbols))

    odd = _code(how, classes, count, told, alphabet, code)
    flat = told.reshape(-1)
    for run in _runs(flat.size, BLOCK if alphabet > FIRST_LARGE or odd is not None else LONG_RUN):
        found = from_tokens(flat[run], data)
        if odd is not None:
            if int(np.abs(found).max()) > LARGEST // 2:
                raise WireError(f"lanes: a multiple of more than {LARGEST} steps")
            found = np.asarray(2 * found - np.sign(found) * odd.reshape(-1)[run], np.int32)
        flat[run] = found
    numbers = np.zeros((len(classes), length), np.int32)
    numbers[order] = told
    return numbers.reshape(-1)[:count]


def lane_entropy(numbers: NDArray[np.signedinteger]) -> float:
    """Bits that `encode_lanes` needs at least: as if all frequencies were known beforehand, for nothing."""
    _, lanes, odd = _cut(numbers)
    classes = lane_classes(lanes)
    contexts = np.repeat(2 * classes, lanes.shape[1]) + odd.reshape(-1)
    tokens = to_tokens(lanes.reshape(-1))
    inside = (contexts > 1) & (np.arange(tokens.size) < numbers.size)
    coded = sum(entropy_bits(tokens[inside & (contexts == one)]) for one in np.unique(contexts))
    return coded + float(plain_width(tokens).sum()) + entropy_bits(classes)


class LaneModel:
    """Frequencies of tokens by context along the trellis, learnt as they are read.

    Args:
        classes: (n,) of the lanes.
        alphabet: tokens are below this.
    """

    family = constriction.stream.model.Categorical(perfect=False)

    def __init__(self, classes: NDArray[np.signedinteger], alphabet: int) -> None:
        self.alphabet = alphabet
        used = np.flatnonzero(np.bincount(classes))
        self._context = 2 * np.searchsorted(used, classes)
        start = np.array([_start(int(number), alphabet) for number in used], np.int64)
        self._frequencies = np.repeat(start, 2, axis=0)  # (contexts, alphabet)

    def contexts(self, rows: Ints, odd: NDArray[np.int8]) -> Ints:
        """Contexts of a column's numbers: of lanes `rows`, in an odd state or not."""
        return np.asarray(self._context[rows] + odd)

    def probabilities(self, contexts: Ints) -> NDArray[np.float32]:
        """(len(contexts), alphabet), not normalised."""
        return self._frequencies.astype(np.float32)[contexts]

    def learn(self, contexts: Ints, symbols: NDArray[np.signedinteger]) -> None:
        """Count a column."""
        shape = self._frequencies.shape
        seen = np.bincount(contexts * shape[1] + symbols, minlength=self._frequencies.size)
        self._frequencies += SEEN * seen.reshape(shape)
        full = self._frequencies.sum(axis=1) > MOST_COUNTED
        self._frequencies[full] = (self._frequencies[full] + 1) // 2


# --- Words: the same for who writes and who reads ------------------------------------


def _code(
    how: int, classes: NDArray[np.signedinteger], count: int, tokens: Whole, alphabet: int, code: Code
) -> NDArray[np.int8] | None:
    """Write `tokens`, the lanes in the order of `_order`, or fill them with what is read.

    Returns:
        Along the trellis, 1 where the state of a token's lane is odd.
    """
    short = len(classes) * tokens.shape[1] - count  # numbers that the last lane lacks
    if how == ALONG:
        return _code_along(classes, short, tokens, alphabet, code)
    lanes, flat, stop = np.bincount(classes), tokens.reshape(-1), 0
    for number in (np.flatnonzero(lanes[1:]) + 1).tolist():
        start, stop = stop, stop + int(lanes[number]) * tokens.shape[1]
        _code_class(flat[start : stop - short * int(number == classes[-1])], number, alphabet, code)
    return None


def _code_class(tokens: Whole, number: int, alphabet: int, code: Code) -> None:
    """The tokens of one class, from blocks each as long as all before it."""
    frequencies, start = np.array(_start(number, alphabet), np.int64), 0
    while start < tokens.size:
        block = tokens[start : max(FIRST_BLOCK, 2 * start)]
        model = constriction.stream.model.Categorical(frequencies.astype(np.float32), perfect=False)
        block[:] = code(block, model)
        start += block.size
        if start < tokens.size:
            frequencies += SEEN * np.bincount(block, minlength=alphabet)
            while int(frequencies.sum()) > MOST_COUNTED:
                frequencies = (frequencies + 1) // 2


def _code_along(
    classes: NDArray[np.signedinteger], short: int, tokens: Whole, alphabet: int, code: Code
) -> NDArray[np.int8]:
    """Column after column of blocks of lanes."""
    order, length = _order(ALONG, classes), tokens.shape[1]
    model, parity = LaneModel(classes[order], alphabet), _parities(alphabet)
    odd, state = np.zeros(tokens.shape, np.int8), np.zeros(len(order), np.int8)
    for block in _runs(len(order), BLOCK_LANES):
        rows = np.arange(block.start, min(block.stop, len(order)))
        for at in range(length):
            if at == length - short:
                rows = rows[order[rows] < len(classes) - 1]
            if rows.size:
                odd[rows, at] = state[rows] & 1
                contexts = model.contexts(rows, odd[rows, at])
                symbols = code(tokens[rows, at], model.family, model.probabilities(contexts))
                tokens[rows, at] = symbols
                model.learn(contexts, symbols)
                state[rows] = NEXT[state[rows], parity[symbols]]
    return odd


@lru_cache(maxsize=256)
def _start(number: int, alphabet: int) -> tuple[int, ...]:
    """Frequencies of a class before any number was read, in integers.

    Of sizes s they go as 1 / (1 + (s / 2m)^2 + s^2 (s - 1)^2 / (1.5 m)^4), where m is the mean.
    """
    exponent = number - UNIT_CLASS  # m^2 is 2^exponent
    above, below = 1 << max(0, exponent), 1 << max(0, -exponent)
    weights = []
    for token in range(alphabet):
        size, width = (token + 1) // 2, 1
        if token >= 32:
            code = token - 32
            middle = code // 16 + 1  # plain bits
            size, width = (code % 16 // 4 + 4) << (middle + 1), 1 << middle
        one = 324 * above**2
        rest = 81 * above * below * size**2 + 64 * (below * size * (size - 1)) ** 2
        weights.append((one * width << 32) // (one + rest))
    total = sum(weights)
    return tuple(1 + START * weight // total for weight in weights)


# --- Lanes ---------------------------------------------------------------------------


def _cut(numbers: NDArray[np.signedinteger | np.floating]) -> tuple[int, Whole, NDArray[np.int8]]:
    """How they are told, (n, L) lanes of what is told of each, and whether its state is odd."""
    length, flat = lane_length(numbers.size), as_whole(numbers).reshape(-1)
    if flat.size % length:
        flat = np.concatenate([flat, np.zeros(-flat.size % length, np.int32)])
    lanes = flat.reshape(-1, length)
    if (found := walk(lanes)) is not None:
        return ALONG, *found
    return PLAIN, lanes, np.zeros(lanes.shape, np.int8)


def _order(how: int, classes: NDArray[np.signedinteger]) -> Ints:
    """Lanes in the order in which they are told, those of class 0 left out: by class, or as they lie."""
    if how == ALONG:  # so that a column holds all classes: their frequencies are learnt sooner
        return np.flatnonzero(classes)
    return classes.argsort(kind="stable")[int((classes == 0).sum()) :]


def _parities(alphabet: int) -> NDArray[np.int8]:
    """Whether the number behind a token is odd."""
    tokens = np.arange(alphabet)
    return np.where(tokens < 32, (tokens + 1) // 2, tokens // 2 % 2).astype(np.int8) & np.int8(1)


def _runs(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
