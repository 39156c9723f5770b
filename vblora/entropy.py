"""Whole numbers in as few bytes as their frequencies allow: range-coded tokens, the rest in plain bits.

A small number is its own token. A larger one is told by its length in bits, its sign and its first three
bits, as one token; the bits below follow as they are, for they are close to random. So any alphabet is
small, whatever the largest number is, and its frequencies travel in a few bytes. The coder is constriction's
(arXiv 2201.01741). Encoding is canonical: one array, one byte string.

A stream: count of tokens used varint | for each: token varint (as the distance from the last), occurrences
varint | words of the coder varint, u32 ... | plain bits, block after block of 2^16 numbers. Varints are
LEB128: 7 bits a byte, low first.
"""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from vblora.errors import WireError

__all__ = ["LARGEST", "Reader", "decode_integers", "encode_integers", "entropy_bits", "varint"]

Ints = NDArray[np.int64]

DIRECT = 16  # numbers below this in size are tokens of their own
MANTISSA = 3  # bits of a larger one that its token tells, the leading one among them
LARGEST = (1 << 31) - 1
MAX_TOKENS = 512
BLOCK = 1 << 16  # numbers decoded at once: the temporaries stay small beside the result


def encode_integers(numbers: NDArray[np.signedinteger]) -> bytes:
    """Write integers of any shape, in C order, each of size `LARGEST` at most."""
    flat = np.ascontiguousarray(numbers, np.int64).reshape(-1)
    tokens, extras, widths = _split(flat)
    occurrences = np.bincount(tokens, minlength=MAX_TOKENS)
    used = np.flatnonzero(occurrences)
    counts, symbols = occurrences[used], (np.cumsum(occurrences > 0) - 1)[tokens]
    table = b"".join(
        varint(int(step)) + varint(int(count))
        for step, count in zip(np.diff(used, prepend=0), counts, strict=True)
    )
    words = np.empty(0, np.uint32)
    if len(used) > 1:
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(symbols.astype(np.int32), _model(counts))
        words = encoder.get_compressed()
    coded = varint(len(words)) + words.astype("<u4").tobytes()
    ends = np.cumsum(
        [(tokens[start : start + BLOCK] >= 2 * DIRECT).sum() for start in range(0, len(flat), BLOCK)]
    )
    plain = b"".join(map(_plain_bits, _cut(extras, ends), _cut(widths, ends)))
    return varint(len(used)) + table + coded + plain


def decode_integers(data: Reader, count: int) -> NDArray[np.int32]:
    """Read `count` integers. Nothing is allocated beyond them, a block, and the bytes at hand.

    Raises:
        WireError: the bytes are not a stream of that many numbers.
    """
    used, occurrences = _read_table(data, count)
    words = np.frombuffer(data.take(4 * data.varint()), "<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    model = _model(occurrences) if len(used) > 1 else None
    numbers = np.zeros(count, np.int32)
    found = np.zeros(len(used), np.int64)
    table = _small_numbers(used)
    for start in range(0, count, BLOCK):
        block = numbers[start : start + BLOCK]
        symbols = np.zeros(len(block), np.int32) if model is None else decoder.decode(model, len(block))
        found += np.bincount(symbols, minlength=len(used))
        block[:] = table[symbols]
        if len(used) and used[-1] >= 2 * DIRECT:
            tokens = used[symbols]
            large = tokens >= 2 * DIRECT
            block[large] = _large_numbers(tokens[large], data)
    if not np.array_equal(found, occurrences):
        raise WireError("integers: the numbers do not occur as often as their table says")
    return numbers


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

    def finish(self) -> None:
        """See that nothing is left.

        Raises:
            WireError: something is.
        """
        if len(self._left):
            raise WireError(f"payload: {len(self._left)} bytes are left over")


def _split(flat: Ints) -> tuple[Ints, Ints, Ints]:
    """Tokens of all numbers; of the large ones plain remainders, and how many bits each of these has."""
    size = np.abs(flat)
    if flat.size and int(size.max()) > LARGEST:
        raise WireError(f"integers: {int(size.max())} is the largest, expected {LARGEST} at most")
    tokens = 2 * size - (flat < 0)  # 0, -1, 1, -2, 2, ...
    large = np.flatnonzero(size >= DIRECT)
    size = size[large]
    widths = np.frexp(size.astype(np.float64))[1].astype(np.int64) - MANTISSA
    lead = size >> widths  # 4 to 7
    tokens[large] = 2 * DIRECT + 8 * widths + 2 * (lead - 4) + (flat[large] < 0)
    return tokens, size & ((np.int64(1) << widths) - 1), widths


def _small_numbers(tokens: Ints) -> NDArray[np.int32]:
    """The numbers that tokens stand for, where they are small."""
    return np.where(tokens % 2 == 1, -(tokens + 1) // 2, tokens // 2).astype(np.int32)


def _large_numbers(tokens: Ints, data: Reader) -> NDArray[np.int32]:
    """The numbers that tokens of large ones and plain bits stand for."""
    code = tokens - 2 * DIRECT
    widths = code // 8
    size = ((code % 8) // 2 + 4 << widths) + _read_plain_bits(data, widths)
    return np.where(code % 2 == 1, -size, size).astype(np.int32)


def _read_table(data: Reader, count: int) -> tuple[Ints, Ints]:
    kinds = data.varint()
    if kinds > min(MAX_TOKENS, count):
        raise WireError(
            f"integers: {kinds} tokens for {count} numbers, expected {min(MAX_TOKENS, count)} at most"
        )
    rows = [(data.varint(), data.varint()) for _ in range(kinds)]
    steps, occurrences = [step for step, _ in rows], [times for _, times in rows]
    if sum(occurrences) != count or 0 in occurrences or 0 in steps[1:] or sum(steps) >= MAX_TOKENS:
        raise WireError(
            f"integers: the table counts {sum(occurrences)} numbers, expected {count}, each token once"
        )
    used = np.cumsum(np.array(steps, np.int64))
    widths = np.where(used >= 2 * DIRECT, (used - 2 * DIRECT) // 8, 0)
    if kinds and int(widths.max()) > 31 - MANTISSA:
        raise WireError("integers: a token of a number beyond 31 bits")
    return used, np.array(occurrences, np.int64)


def _model(counts: Ints) -> constriction.stream.model.Categorical:
    """Frequencies as the coder holds them: 24 bits, by float32 additions alone, so alike on every machine."""
    return constriction.stream.model.Categorical(counts.astype(np.float32), perfect=False)


def _cut(numbers: Ints, ends: Ints) -> list[Ints]:
    return np.split(numbers, ends[:-1]) if len(ends) else []


def _plain_bits(extras: Ints, widths: Ints) -> bytes:
    """Plane by plane: the lowest bit of all remainders that have one, then the next."""
    planes = [
        ((extras[widths > place] >> place) & 1).astype(np.uint8)
        for place in range(int(widths.max(initial=0)))
    ]
    return np.packbits(np.concatenate(planes), bitorder="little").tobytes() if planes else b""


def _read_plain_bits(data: Reader, widths: Ints) -> Ints:
    total = int(widths.sum())
    packed = np.frombuffer(data.take(-(-total // 8)), np.uint8)
    bits = np.unpackbits(packed, count=total, bitorder="little").astype(np.int64)
    extras = np.zeros(len(widths), np.int64)
    at = 0
    for place in range(int(widths.max(initial=0))):
        inside = widths > place
        count = int(inside.sum())
        extras[inside] |= bits[at : at + count] << place
        at += count
    return extras
