"""Many whole numbers of one kind as bytes, coded by how large their neighbours are.

A section is cut, in C order, into lanes (`vblora.trellis.lane_length`). Bank vectors move unevenly, so each
lane has a class, that of its mean size, which travels first. The numbers follow, each by the frequencies of
its context: its class and, along a trellis, whether its state is odd. Frequencies start from a shape that the
class gives, and learn from what was read: in a large section class after class, from blocks that double; in a
small one, and along a trellis, from every column of the lanes. So no table travels, and a small section is
coded nearly as well as a large one.

Axes: n lanes, L numbers of a lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import constriction
import numpy as np
from numpy.typing import NDArray

from vblora.entropy import (
    LARGEST,
    MAX_TOKENS,
    Reader,
    decode_integers,
    decode_symbols,
    encode_integers,
    entropy_bits,
    from_tokens,
    plain_bits,
    plain_width,
    to_tokens,
    varint,
)
from vblora.errors import WireError
from vblora.trellis import NEXT, lane_length, walk

__all__ = ["LaneModel", "decode_lanes", "encode_lanes", "lane_classes", "lane_entropy"]

Ints = NDArray[np.int64]

PLAIN, ALONG, BY_CLASS = 0, 1, 2  # plain, along the trellis, plain and class after class
MANY = 1 << 13  # numbers of a section that is told by class: several times faster, and learning costs little
FIRST_BLOCK = 1 << 8  # numbers of a class that are told before any was learnt
BLOCK_LANES = 512  # lanes coded side by side
RUN_LANES = 64  # lanes whose plain bits lie together
RUN = 1 << 12  # numbers whose plain bits do, where classes follow one another
UNIT_CLASS = 9  # of a mean size of 1; classes are half octaves apart, class 0 is all zeros
MOST_CLASS = UNIT_CLASS + 62
SEEN = 128  # what one number that was read adds to a frequency
MOST_SEEN = 1 << 22  # frequencies of a context are halved above this: the coder knows none below 2^-24
START = 32 * SEEN  # what the frequencies of a context come to before any was read


def lane_classes(lanes: NDArray[np.floating | np.signedinteger]) -> Ints:
    """(n,) classes of (n, L) numbers: 0 where all are 0, else the mean size in half octaves."""
    mean = np.abs(lanes).mean(axis=1, dtype=np.float64)
    edges = 2.0 ** ((np.arange(2, MOST_CLASS + 1) - UNIT_CLASS - 0.5) / 2)
    return np.where(mean > 0, 1 + np.searchsorted(edges, mean), 0)


def encode_lanes(numbers: NDArray[np.signedinteger]) -> bytes:
    """Write whole numbers of any shape, in C order; along the trellis where they follow it."""
    how, lanes, odd = _cut(numbers)
    classes = lane_classes(lanes)
    out = [bytes([how]), encode_integers(classes)]
    if how == BY_CLASS and classes.any():
        out += _told_by_class(np.ascontiguousarray(numbers, np.int64).reshape(-1), classes)
    elif classes.any():
        tokens = to_tokens(lanes.reshape(-1)).reshape(lanes.shape)
        model = LaneModel(classes, alphabet=int(tokens.max()) + 1)
        encoder = constriction.stream.queue.RangeEncoder()
        for rows, at in _columns(classes, numbers.size):
            contexts, symbols = model.contexts(rows, odd[rows, at]), tokens[rows, at]
            encoder.encode(symbols.astype(np.int32), model.family, model.probabilities(contexts))
            model.learn(contexts, symbols)
        words = encoder.get_compressed()
        out += [varint(model.alphabet), varint(len(words)), words.astype("<u4").tobytes()]
        out += [plain_bits(lanes[rows].reshape(-1)) for rows in _runs(len(lanes), RUN_LANES)]
    return b"".join(out)


def lane_entropy(numbers: NDArray[np.signedinteger]) -> float:
    """Bits that `encode_lanes` needs at least: as if all frequencies were known beforehand, for nothing."""
    _, lanes, odd = _cut(numbers)
    classes = lane_classes(lanes)
    contexts = np.repeat(2 * classes, lanes.shape[1]) + odd.reshape(-1)
    tokens = to_tokens(lanes.reshape(-1))
    inside = (contexts > 1) & (np.arange(tokens.size) < numbers.size)
    coded = sum(entropy_bits(tokens[inside & (contexts == one)]) for one in np.unique(contexts))
    return coded + float(plain_width(tokens).sum()) + entropy_bits(classes)


def decode_lanes(data: Reader, count: int) -> NDArray[np.int32]:
    """Read `count` numbers. Nothing is allocated beyond them, a block, and the bytes at hand.

    Raises:
        WireError: the bytes are not that many numbers.
    """
    length = lane_length(count)
    numbers = np.zeros((-(-count // length), length), np.int32)
    how = data.take(1)[0]
    classes = decode_integers(data, len(numbers))
    if how not in (PLAIN, ALONG, BY_CLASS) or not ((classes >= 0) & (classes <= MOST_CLASS)).all():
        raise WireError(f"lanes: way {how}, expected 0 to 2, or a class that is not 0 to {MOST_CLASS}")
    if not classes.any():
        return numbers.reshape(-1)[:count]
    alphabet = data.varint()
    if not 2 <= alphabet <= MAX_TOKENS:
        raise WireError(f"lanes: {alphabet} tokens, expected 2 to {MAX_TOKENS}")
    if how == BY_CLASS:
        return _read_by_class(data, alphabet, classes, numbers.reshape(-1)[:count])
    model, decoder = LaneModel(classes, alphabet), data.range_decoder()
    parity = _parities(alphabet)
    odd = np.zeros(numbers.shape, np.int8)
    state = np.zeros(len(numbers), np.int8)
    for rows, at in _columns(classes, count):
        if how == ALONG:
            odd[rows, at] = state[rows] & 1
        contexts = model.contexts(rows, odd[rows, at])
        numbers[rows, at] = symbols = decode_symbols(decoder, model.family, model.probabilities(contexts))
        model.learn(contexts, symbols)
        state[rows] = NEXT[state[rows], parity[symbols]]
    for run in _runs(len(numbers), RUN_LANES):  # tokens so far
        found = from_tokens(numbers[run].reshape(-1), data).reshape(-1, length)
        if how == ALONG and int(np.abs(found).max()) > LARGEST // 2:
            raise WireError(f"lanes: a multiple of more than {LARGEST} steps")
        numbers[run] = found if how == PLAIN else 2 * found - np.sign(found) * odd[run]
    return numbers.reshape(-1)[:count]


class LaneModel:
    """Frequencies of tokens by context, learnt as they are read.

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
        full = self._frequencies.sum(axis=1) > MOST_SEEN
        self._frequencies[full] = (self._frequencies[full] + 1) // 2


class _ClassModel:
    """Frequencies of the tokens of one class, learnt block by block.

    Args:
        number: the class.
        alphabet: tokens are below this.
    """

    def __init__(self, number: int, alphabet: int) -> None:
        self._frequencies = np.array(_start(number, alphabet), np.int64)

    def now(self) -> constriction.stream.model.Categorical:
        """What the next block is told by."""
        return constriction.stream.model.Categorical(self._frequencies.astype(np.float32), perfect=False)

    def learn(self, symbols: NDArray[np.signedinteger]) -> None:
        """Count a block."""
        self._frequencies += SEEN * np.bincount(symbols, minlength=len(self._frequencies))
        while int(self._frequencies.sum()) > MOST_SEEN:
            self._frequencies = (self._frequencies + 1) // 2


def _told_by_class(flat: Ints, classes: Ints) -> Iterator[bytes]:
    """The alphabet, the words, and the plain bits of a section that is told class after class."""
    tokens = to_tokens(flat)
    alphabet = int(tokens.max()) + 1
    encoder = constriction.stream.queue.RangeEncoder()
    for number, inside in _by_class(classes, flat.size):
        own, model = tokens[inside].astype(np.int32), _ClassModel(number, alphabet)
        for block in _doubling(own.size):
            encoder.encode(own[block], model.now())
            model.learn(own[block])
    words = encoder.get_compressed()
    yield varint(alphabet) + varint(len(words)) + words.astype("<u4").tobytes()
    for run in _runs(flat.size, RUN):
        yield plain_bits(flat[run])


def _read_by_class(
    data: Reader, alphabet: int, classes: NDArray[np.int32], flat: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Fill `flat`, which is all zeros, with what `_told_by_class` has told after the alphabet."""
    decoder = data.range_decoder()
    for number, inside in _by_class(classes, flat.size):
        model = _ClassModel(number, alphabet)
        own = np.zeros(int(inside.sum()), np.int32)
        for block in _doubling(own.size):
            own[block] = decode_symbols(decoder, model.now(), block.stop - block.start)
            model.learn(own[block])
        flat[inside] = own
    for run in _runs(flat.size, RUN):  # tokens so far
        flat[run] = from_tokens(flat[run], data)
    return flat


def _doubling(count: int) -> Iterator[slice]:
    """Blocks of a class: each as long as all before it."""
    start = 0
    while start < count:
        stop = min(count, max(FIRST_BLOCK, 2 * start))
        yield slice(start, stop)
        start = stop


@lru_cache(maxsize=256)
def _start(number: int, alphabet: int) -> tuple[int, ...]:
    """Frequencies of a class before any number was read: as 1 / (1 + (size / (1.5 mean))^4), in integers."""
    exponent = 2 * (number - UNIT_CLASS)  # mean^4 is 2^exponent
    above, below = 81 << max(0, exponent), 16 << max(0, -exponent)
    weights = []
    for token in range(alphabet):
        size, width = (token + 1) // 2, 1
        if token >= 32:
            code = token - 32
            middle = code // 16 + 1  # plain bits
            size, width = (code % 16 // 4 + 4) << (middle + 1), 1 << middle
        weights.append((above * width << 32) // (above + below * size**4))
    total = sum(weights)
    return tuple(1 + START * weight // total for weight in weights)


def _cut(numbers: NDArray[np.signedinteger]) -> tuple[int, Ints, NDArray[np.int8]]:
    """How they are told, (n, L) lanes of what is told of each, and whether its state is odd."""
    length = lane_length(numbers.size)
    lanes = np.zeros((-(-numbers.size // length), length), np.int64)
    lanes.reshape(-1)[: numbers.size] = numbers.reshape(-1)
    if (found := walk(lanes)) is not None:
        return ALONG, *found
    return (PLAIN if numbers.size < MANY else BY_CLASS), lanes, np.zeros(lanes.shape, np.int8)


def _by_class(classes: NDArray[np.signedinteger], count: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Each class but 0, rising, and which of `count` numbers lie in its lanes."""
    of_number = np.repeat(classes.astype(np.int8), lane_length(count))[:count]
    return ((int(one), of_number == one) for one in np.flatnonzero(np.bincount(classes)) if one)


def _parities(alphabet: int) -> NDArray[np.int8]:
    """Whether the number behind a token is odd."""
    tokens = np.arange(alphabet)
    return np.where(tokens < 32, (tokens + 1) // 2, tokens // 2 % 2).astype(np.int8) & np.int8(1)


def _runs(lanes: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, lanes, size)]


def _columns(classes: NDArray[np.signedinteger], count: int) -> Iterator[tuple[Ints, int]]:
    """Block by block the columns, each with the lanes that have a number there to be read."""
    length = lane_length(count)
    short = count - (len(classes) - 1) * length  # numbers of the last lane
    for block in _runs(len(classes), BLOCK_LANES):
        rows = block.start + np.flatnonzero(classes[block])
        for at in range(length):
            if at == short and rows.size and rows[-1] == len(classes) - 1:
                rows = rows[:-1]
            if rows.size:
                yield rows, at
