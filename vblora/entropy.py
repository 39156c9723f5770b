"""Whole numbers in as few bytes as their frequencies allow: range-coded tokens, the rest in plain bits.

A small number is its own token. A larger one is told by its length in bits, its sign, its first three bits
and its last one, as one token; the bits between follow as they are, for they are close to random. So any
alphabet is small, whatever the largest number is, and its frequencies travel in a few bytes. The coder is
constriction's (arXiv 2201.01741). Encoding is canonical: one array, one byte string.

A stream: count of tokens used varint | for each: token varint (as the distance from the last), occurrences
varint | words of the coder varint, u32 ... | plain bits, run after run of 2^12 numbers. No numbers, no
bytes. Varints are LEB128: 7 bits a byte, low first.
"""

from __future__ import annotations

from collections.abc import Iterator

import constriction
import numpy as np
from numpy.typing import NDArray

from vblora.errors import WireError

__all__ = [
    "BLOCK",
    "LARGEST",
    "MAX_TOKENS",
    "MOST_COUNTED",
    "Reader",
    "as_whole",
    "decode_integers",
    "decode_symbols",
    "encode_integers",
    "entropy_bits",
    "from_tokens",
    "plain_runs",
    "plain_width",
    "to_tokens",
    "varint",
]

Ints = NDArray[np.int64]

DIRECT = 16  # numbers below this in size are tokens of their own
LEADING, TOLD = 3, 4  # bits of a larger one that its token tells: the first of them, all of them
LONGEST = 31
LARGEST = (1 << LONGEST) - 1
FIRST_LARGE = 2 * DIRECT
MAX_TOKENS = FIRST_LARGE + 16 * (LONGEST - TOLD)
MOST_COUNTED = 1 << 22  # frequencies are halved above this: the coder knows none below 2^-24
BLOCK = 1 << 12  # numbers whose plain bits lie together, decoded at once: temporaries stay small


def encode_integers(numbers: NDArray[np.signedinteger]) -> bytes:
    """Write integers of any shape, in C order, each of size `LARGEST` at most."""
    flat = as_whole(numbers).reshape(-1)
    if not flat.size:
        return b""
    tokens = to_tokens(flat)
    occurrences = np.bincount(tokens)
    used = np.flatnonzero(occurrences)
    counts = occurrences[used]
    table, last = [varint(len(used))], 0
    for token, count in zip(used.tolist(), counts.tolist(), strict=True):
        table += [varint(token - last), varint(count)]
        last = token
    words = np.empty(0, np.uint32)
    if len(used) > 1:
        numbered = np.zeros(len(occurrences), np.int32)
        numbered[used] = np.arange(len(used))
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(numbered[tokens], _model(counts))
        words = encoder.get_compressed()
    return b"".join([*table, varint(len(words)), words.astype("<u4").tobytes(), *plain_runs(flat)])


def decode_integers(data: Reader, count: int) -> NDArray[np.int32]:
    """Read `count` integers. Nothing is allocated beyond them, a block, and the bytes at hand.

    Raises:
        WireError: the bytes are not a stream of that many numbers.
    """
    numbers = np.zeros(count, np.int32)
    if not count:
        return numbers
    used, occurrences = _read_table(data, count)
    decoder = data.range_decoder()
    model = _model(occurrences) if len(used) > 1 else None
    found = np.zeros(len(used), np.int64)
    for start in range(0, count, BLOCK):
        block = numbers[start : start + BLOCK]
        symbols = np.zeros(len(block), np.int32)
        if model is not None:
            symbols = decode_symbols(decoder, model, len(block))
        found += np.bincount(symbols, minlength=len(used))
        block[:] = from_tokens(used[symbols], data)
    if not np.array_equal(found, occurrences):
        raise WireError("integers: the numbers do not occur as often as their table says")
    return numbers


def decode_symbols(
    decoder: constriction.stream.queue.RangeDecoder, model: object, what: int | NDArray[np.float32]
) -> NDArray[np.int32]:
    """The next symbols of a range coder: `what` many of one model, or one by each row of probabilities.

    Raises:
        WireError: no symbols are written so.
    """
    try:
        symbols: NDArray[np.int32] = decoder.decode(model, what)
    except AssertionError as error:  # constriction's word for it
        raise WireError(f"integers: the range coder's words are none ({error})") from error
    return symbols


def entropy_bits(numbers: NDArray[np.signedinteger]) -> float:
    """Bits that all the numbers take at least, coded one by one with their own frequencies."""
    flat = numbers.reshape(-1)
    counts = np.bincount(flat - flat.min(initial=0))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / max(1, flat.size))).sum())


def varint(number: int) -> bytes:
    """A number of 0 or more as LEB128."""
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


class Reader:
    """Takes bytes from the front of a payload, and never more than there are."""

    def __init__(self, payload: bytes | memoryview) -> None:
        self._left = memoryview(payload)

    def __len__(self) -> int:
        return len(self._left)

    def take(self, count: int) -> memoryview:
        """The next `count` bytes.

        Raises:
            WireError: fewer are left.
        """
        if count > len(self._left):
            raise WireError(f"payload: {count} bytes are declared, {len(self._left)} are left")
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def varint(self) -> int:
        """The next LEB128 number, below 2^63.

        Raises:
            WireError: it does not end, or is larger.
        """
        number = 0
        for place in range(9):
            byte = self.take(1)[0]
            number |= (byte & 127) << (7 * place)
            if byte < 128:
                return number
        raise WireError("payload: a number of more than 63 bits")

    def range_decoder(self) -> constriction.stream.queue.RangeDecoder:
        """A decoder of the next words: how many varint, u32 each."""
        words = np.frombuffer(self.take(4 * self.varint()), "<u4").astype(np.uint32)
        return constriction.stream.queue.RangeDecoder(words)

    def finish(self) -> None:
        """See that nothing is left.

        Raises:
            WireError: something is.
        """
        if len(self._left):
            raise WireError(f"payload: {len(self._left)} bytes are left over")


def as_whole(numbers: NDArray[np.signedinteger | np.floating]) -> NDArray[np.int32]:
    """Whole numbers of any shape as int32, contiguous.

    Raises:
        WireError: one is larger than `LARGEST`.
    """
    if numbers.size:
        lowest, highest = numbers.min(), numbers.max()
        if not -LARGEST <= lowest <= highest <= LARGEST:
            raise WireError(f"integers: {max(-lowest, highest)} is the largest, expected {LARGEST} at most")
    return np.ascontiguousarray(numbers, np.int32)


def to_tokens(flat: NDArray[np.int32]) -> NDArray[np.int32]:
    """The token of each number, of size `LARGEST` at most."""
    tokens = (flat << 1) ^ (flat >> LONGEST)  # 0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ...
    large = np.flatnonzero(tokens.view(np.uint32) >= 2 * DIRECT - 1)  # as uint32 where they have wrapped
    if large.size:
        size = np.abs(flat[large])
        lengths = _lengths(size)
        lead = size >> (lengths - LEADING)  # 4 to 7
        tokens[large] = (
            FIRST_LARGE + 16 * (lengths - TOLD - 1) + 4 * (lead - 4) + 2 * (size & 1) + (flat[large] < 0)
        )
    return tokens


def from_tokens(tokens: NDArray[np.int32], data: Reader) -> NDArray[np.int32]:
    """The numbers that tokens stand for, with the plain bits that follow in `data`."""
    numbers, odd = tokens >> 1, tokens & 1
    numbers ^= np.negative(odd, out=odd)
    large = np.flatnonzero(tokens >= FIRST_LARGE)
    if large.size:
        code = tokens[large] - np.int32(FIRST_LARGE)
        widths = code // 16 + 1
        size = ((code % 16 // 4 + 4) << (widths + 1)) + (code % 4 // 2)
        size += _read_plain_bits(data, widths) << 1
        numbers[large] = np.where(code % 2 == 1, -size, size)
    return numbers


def plain_width(tokens: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
    """How many plain bits follow each token."""
    return np.asarray(np.where(tokens < FIRST_LARGE, 0, (tokens - FIRST_LARGE) // 16 + 1))


def plain_runs(flat: NDArray[np.int32]) -> Iterator[bytes]:
    """What `from_tokens` reads beside the tokens of each run of `BLOCK` numbers, plane by plane: the lowest
    of these bits of all numbers that have one, then the next."""
    for start in range(0, len(flat), BLOCK):
        size = np.abs(flat[start : start + BLOCK])
        size = size[size >= DIRECT]
        if size.size:
            widths = _lengths(size) - TOLD
            planes = [
                ((size[widths > place] >> (place + 1)) & 1).astype(np.uint8)
                for place in range(int(widths.max()))
            ]
            yield np.packbits(np.concatenate(planes), bitorder="little").tobytes()


def _read_plain_bits(data: Reader, widths: NDArray[np.int32]) -> NDArray[np.int32]:
    packed = np.frombuffer(data.take(-(-int(widths.sum(dtype=np.int64)) // 8)), np.uint8)
    middle = np.zeros(len(widths), np.int32)
    at = 0
    for place in range(int(widths.max(initial=0))):
        inside = widths > place
        end = at + int(inside.sum())
        bits = np.unpackbits(packed[at // 8 : -(-end // 8)], bitorder="little")[at % 8 : at % 8 + end - at]
        middle[inside] |= bits.astype(np.int32) << place
        at = end
    return middle


def _lengths(size: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bits of numbers above 0."""
    return np.frexp(size.astype(np.float64))[1].astype(np.int32, copy=False)


def _read_table(data: Reader, count: int) -> tuple[NDArray[np.int32], Ints]:
    kinds = data.varint()
    most = min(MAX_TOKENS, count)
    if not 1 <= kinds <= most:
        raise WireError(f"integers: {kinds} tokens for {count} numbers, expected 1 to {most}")
    rows = [(data.varint(), data.varint()) for _ in range(kinds)]
    steps, occurrences = [step for step, _ in rows], [times for _, times in rows]
    if sum(occurrences) != count or 0 in occurrences or 0 in steps[1:] or sum(steps) >= MAX_TOKENS:
        raise WireError(
            f"integers: the table counts {sum(occurrences)} numbers, expected {count}, each token once"
        )
    return np.cumsum(steps, dtype=np.int32), np.array(occurrences, np.int64)


def _model(counts: Ints) -> constriction.stream.model.Categorical:
    """Frequencies as the coder holds them: 24 bits, by single steps in float32, so alike on every machine."""
    while int(counts.sum()) > MOST_COUNTED:
        counts = (counts + 1) // 2
    return constriction.stream.model.Categorical(counts.astype(np.float32), perfect=False)
