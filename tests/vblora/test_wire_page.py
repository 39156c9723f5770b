"""docs/wire.md says all that there is to know: a reader of messages written from it alone.

Of ours it has version 0, which the page does not tell how to draw, and the bases of the golden blobs.

Slow and plain on purpose. Whoever changes the format changes the page first, then this.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import constriction
import numpy as np
import pytest

from tests.vblora.make_golden import GOLDEN_BLOBS, make_reference, read_golden
from vblora.state import Update
from vblora.wire import initial

FAMILY = constriction.stream.model.Categorical(perfect=False)


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        taken, self.data = self.data[:count], self.data[count:]
        assert len(taken) == count
        return taken

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def varint(self) -> int:
        number, place = 0, 0
        while True:
            (byte,) = self.take(1)
            number |= (byte & 127) << place
            place += 7
            if byte < 128:
                return number

    def coder(self) -> constriction.stream.queue.RangeDecoder:
        words = self.take(4 * self.varint())
        return constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))


# --- "Whole numbers" -----------------------------------------------------------------


def plain_bits(tokens: list[int], data: Bytes) -> list[int]:
    """The plain bits of each token's number."""
    widths = [(token - 32) // 16 + 1 if token >= 32 else 0 for token in tokens]
    total = sum(widths)
    packed = int.from_bytes(data.take(-(-total // 8)), "little")
    found, at = [0] * len(tokens), 0
    for plane in range(max(widths, default=0)):
        for number, width in enumerate(widths):
            if width > plane:
                found[number] |= (packed >> at & 1) << plane
                at += 1
    return found


def number(token: int, middle: int) -> int:
    if token < 32:
        return -(token + 1) // 2 if token % 2 else token // 2
    code = token - 32
    width, first, last, negative = code // 16 + 1, 4 + code % 16 // 4, code // 2 % 2, code % 2
    size = (first << width | middle) << 1 | last
    return -size if negative else size


def integers(data: Bytes, count: int) -> list[int]:
    if not count:
        return []
    tokens, occurrences = [], []
    for _ in range(data.varint()):
        tokens.append((tokens[-1] if tokens else 0) + data.varint())
        occurrences.append(data.varint())
    coder = data.coder()
    symbols = [0] * count
    if len(tokens) > 1:
        model = constriction.stream.model.Categorical(np.array(occurrences, np.float32), perfect=False)
        symbols = coder.decode(model, count).tolist()
    found: list[int] = []
    for start in range(0, count, 1 << 12):
        block = [tokens[symbol] for symbol in symbols[start : start + (1 << 12)]]
        found += map(number, block, plain_bits(block, data))
    return found


# --- "Lanes" -------------------------------------------------------------------------

NEXT = [(0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)]


def start_of(level: int, alphabet: int) -> list[int]:
    p, q = max(0, level - 9), max(0, 9 - level)
    weights = []
    for token in range(alphabet):
        width = (token - 32) // 16 + 1 if token >= 32 else 0
        size = abs(number(token, 0)) & ~1 if token >= 32 else abs(number(token, 0))
        rest = 81 * 2 ** (p + q) * size**2 + 64 * 2 ** (2 * q) * (size * (size - 1)) ** 2
        weights.append(2**32 * 324 * 2 ** (2 * p) * 2**width // (324 * 2 ** (2 * p) + rest))
    return [1 + 4096 * weight // sum(weights) for weight in weights]


Places = list[tuple[int, int]]  # lane, and number in it


def by_class(coder: Any, tokens: list[list[int]], classes: list[int], inside: Places, alphabet: int) -> None:
    for level in sorted(set(classes) - {0}):
        places = [place for place in inside if classes[place[0]] == level]
        frequencies, done = start_of(level, alphabet), 0
        while done < len(places):
            block = places[done : max(256, 2 * done)]
            row = np.array(frequencies, np.float32)
            for lane, at in block:
                (tokens[lane][at],) = coder.decode(FAMILY, row[None]).tolist()
            for lane, at in block:
                frequencies[tokens[lane][at]] += 128
            while sum(frequencies) > 1 << 22:
                frequencies = [(one + 1) // 2 for one in frequencies]
            done += len(block)


def along(
    coder: Any, tokens: list[list[int]], classes: list[int], inside: Places, alphabet: int
) -> list[list[int]]:
    frequencies = {(level, odd): start_of(level, alphabet) for level in set(classes) for odd in (0, 1)}
    odds, states = [[0] * len(lane) for lane in tokens], [0] * len(tokens)
    told = [lane for lane, level in enumerate(classes) if level]
    for first in range(0, len(told), 512):
        for column in range(len(tokens[0])):
            seen = []
            for lane in told[first : first + 512]:
                if (lane, column) not in inside:
                    continue
                odds[lane][column] = odd = states[lane] % 2
                row = np.array([frequencies[classes[lane], odd]], np.float32)
                (token,) = coder.decode(FAMILY, row).tolist()
                tokens[lane][column] = token
                states[lane] = NEXT[states[lane]][abs(number(token, 0)) % 2]
                seen.append((classes[lane], odd, token))
            for level, odd, token in seen:
                frequencies[level, odd][token] += 128
            for context, row in frequencies.items():
                if sum(row) > 1 << 22:
                    frequencies[context] = [(one + 1) // 2 for one in row]
    return odds


def lanes(data: Bytes, count: int) -> list[int]:
    length = 8
    while 2 * length <= min(128, math.isqrt(count)):
        length *= 2
    lane_count = -(-count // length)
    (way,) = data.take(1)
    classes = integers(data, lane_count)
    if not any(classes):
        return [0] * count
    alphabet = data.varint()
    tokens = [[0] * length for _ in range(lane_count)]
    inside = [divmod(at, length) for at in range(count)]
    order = [lane for lane in range(lane_count) if classes[lane]]
    if way == 1:
        odds = along(data.coder(), tokens, classes, inside, alphabet)
    else:
        by_class(data.coder(), tokens, classes, inside, alphabet)
        order.sort(key=lambda lane: classes[lane])
    told = [(lane, at) for lane in order for at in range(length)]
    found = [[0] * length for _ in range(lane_count)]
    for first in range(0, len(told), 1 << 12):
        run = told[first : first + (1 << 12)]
        flat = [tokens[lane][at] for lane, at in run]
        for (lane, at), k in zip(run, map(number, flat, plain_bits(flat, data)), strict=True):
            found[lane][at] = 2 * k - ((k > 0) - (k < 0)) * odds[lane][at] if way == 1 else k
    return [one for lane in found for one in lane][:count]


# --- "Selections" --------------------------------------------------------------------


def gap_values() -> list[float]:
    values = [0.0]
    for step, times in [(1 / 64, 64), (1 / 32, 32), (1 / 16, 16), (1 / 8, 8), (1 / 4, 4), (1 / 2, 2)]:
        values += [values[-1] + step * (turn + 1) for turn in range(times)]
    return [*values, 7.0, 9.0, 13.0, 21.0]


def moved(base: float, move: int, values: list[float]) -> float:
    if move == 0:
        return base
    above = [value for value in values if value > base]
    below = [value for value in values if value < base]
    return above[move - 1] if move > 0 else below[move]


def selection(
    data: Bytes, base: list[list[int]], base_gaps: list[list[float]], h: int
) -> tuple[list[list[int]], list[list[float]]]:
    (how,) = data.take(1)
    rows, k = len(base), len(base[0])
    fates = integers(data, rows)
    missing, largest = [fate // k for fate in fates], [fate % k for fate in fates]
    by_missing = [[row for row in range(rows) if missing[row] == count] for count in range(k + 1)]
    members = [list(row) for row in base]
    for count, inside in enumerate(by_missing):
        if count and inside:
            lacking, fresh = sets(data, len(inside), count, k), sets(data, len(inside), count, h - k)
            for row, lacks, ranks in zip(inside, lacking, fresh, strict=True):
                free = [place for place in range(h) if place not in base[row]]
                members[row] = [place for at, place in enumerate(base[row]) if at not in lacks]
                members[row] += [free[rank] for rank in ranks]
    if how == 255:
        return in_full(data, base, base_gaps, members, largest)
    values = gap_values()[:: 2**how]
    stays = [fate == 0 for fate in fates]
    places, gaps = [list(row) for row in base], [list(row) for row in base_gaps]
    rest = [[row for row in inside if not stays[row]] for inside in by_missing]
    for inside in ([row for row in range(rows) if stays[row]], *rest):
        told = integers(data, len(inside) * (k - 1))
        for at, row in enumerate(inside):
            moves = told[at * (k - 1) : (at + 1) * (k - 1)]
            if stays[row] and not any(moves):
                continue
            start = base_gaps[row] if stays[row] else [0.0] * (k - 1)
            later = [member for number, member in enumerate(members[row]) if number != largest[row]]
            found = sorted(
                zip((moved(g, m, values) for g, m in zip(start, moves, strict=True)), later, strict=True)
            )
            places[row] = [members[row][largest[row]], *(member for _, member in found)]
            gaps[row] = [gap for gap, _ in found]
    return places, gaps


def sets(data: Bytes, rows: int, size: int, free: int) -> list[list[int]]:
    (how,) = data.take(1)
    if how == 1:
        bits = (math.comb(free, size) - 1).bit_length()
        packed = int.from_bytes(data.take(-(-rows * bits // 8)), "little")
        found = []
        for row in range(rows):
            rank, members = packed >> row * bits & ((1 << bits) - 1), []
            for place in range(size, 0, -1):
                member = max(c for c in range(free) if math.comb(c, place) <= rank)
                rank -= math.comb(member, place)
                members.insert(0, member)
            found.append(members)
        return found
    ranks = [[-1] for _ in range(rows)]
    for _ in range(size):
        for row, step in zip(ranks, integers(data, rows), strict=True):
            row.append(row[-1] + 1 + step)
    return [row[1:] for row in ranks]


def in_full(
    data: Bytes,
    base: list[list[int]],
    base_gaps: list[list[float]],
    members: list[list[int]],
    largest: list[int],
) -> tuple[list[list[int]], list[list[float]]]:
    k = len(base[0])
    differing = [row for row, differs in enumerate(integers(data, len(base))) if differs]
    orders = {row: [largest[row]] for row in differing}
    for _ in range(1, k - 1):
        for row, member in zip(differing, integers(data, len(differing)), strict=True):
            orders[row].append(member)
    places, gaps = [list(row) for row in base], [list(row) for row in base_gaps]
    for row in differing:
        (left,) = set(range(k)) - set(orders[row]) or {0}
        order = [*orders[row], left][:k]
        places[row] = [members[row][member] for member in order]
    for row in differing:
        gaps[row] = list(struct.unpack(f"<{k - 1}f", data.take(4 * (k - 1))))
    return places, gaps


# --- "The frame", "Sections" ---------------------------------------------------------


class Held:
    """What a reader holds: a base, and version 0, which it has drawn."""

    def __init__(self, name: str) -> None:
        blueprint, turn = GOLDEN_BLOBS[name]
        self.shapes = blueprint.dense_shapes
        self.drawn = initial(blueprint)
        self.base = make_reference(blueprint, turn) if turn else self.drawn
        self.places = self.base.topk.positions.tolist() if self.base.topk else []
        self.gaps = self.base.topk.gaps.astype(float).tolist() if self.base.topk else []
        self.h = blueprint.topk_shape[2] if blueprint.topk_shape else 0


def read(blob: bytes, held: Held) -> tuple[dict[str, Any], dict[str, np.ndarray], list[Any], list[Any]]:
    assert zlib.crc32(blob[:-4]) == int.from_bytes(blob[-4:], "little")
    data = Bytes(blob[:-4])
    assert data.take(4) == b"FVBL"
    header = dict(zip(("format", "kind", "sections"), data.unpack("HBB"), strict=True))
    header |= {"fingerprint": data.take(16)}
    rest = ("version", "digest", "base", "base digest", "examples")
    header |= dict(zip(rest, data.unpack("Q16sQ16sI"), strict=True))
    places, gaps = held.places, held.gaps
    dense = {
        name: held.base.dense[name] if header["kind"] == 1 else np.zeros(shape, np.float32)
        for name, shape in held.shapes.items()
    }
    for _ in range(header["sections"]):
        name = data.take(data.take(1)[0]).decode()
        encoding, axes = data.unpack("BB")
        shape = data.unpack("I" * axes)
        (length,) = data.unpack("Q")
        payload = Bytes(data.take(length))
        if encoding == 5:
            places, gaps = selection(payload, places, gaps, held.h)
        else:
            numbers = READERS[encoding](payload, math.prod(shape), held, name)
            dense[name] = np.array(numbers, np.float32).reshape(shape)
        assert not payload.data
    assert not data.data
    return header, dense, places, gaps


def float32(payload: Bytes, count: int, held: Held, name: str) -> Any:
    return payload.unpack(f"{count}f")


def bfloat16(payload: Bytes, count: int, held: Held, name: str) -> Any:
    return [struct.unpack("<f", bytes(2) + payload.take(2))[0] for _ in range(count)]


def steps(payload: Bytes, count: int, held: Held, name: str) -> Any:
    (step,) = payload.unpack("f")
    return np.array(lanes(payload, count), np.float32) * np.float32(step)


def grid(payload: Bytes, count: int, held: Held, name: str) -> Any:
    (exponent,) = payload.take(1)
    drawn, base = (state.dense[name].reshape(-1).astype(float) for state in (held.drawn, held.base))
    own = np.rint((base - drawn) * 2**20)
    return drawn + 2.0**-20 * (own + np.array(lanes(payload, count)) * 2.0**exponent)


def digest(version: int, dense: dict[str, np.ndarray], places: list[Any], gaps: list[Any]) -> bytes:
    content = struct.pack("<Q", version)
    for name in sorted(dense):
        content += name.encode() + dense[name].astype("<f4").tobytes()
    content += np.array(places, "<i4").tobytes() + np.array(gaps, "<f4").tobytes()
    return hashlib.sha256(content).digest()[:16]


READERS: dict[int, Callable[[Bytes, int, Held, str], Any]] = {1: float32, 2: bfloat16, 3: steps, 4: grid}


@pytest.mark.parametrize("name", GOLDEN_BLOBS)
def test_a_reader_made_from_the_page_reads_the_same(name: str):
    blob, found = read_golden(name)
    blueprint, turn = GOLDEN_BLOBS[name]
    header, dense, places, gaps = read(blob, Held(name))
    for section, array in found.dense.items():
        np.testing.assert_array_equal(dense[section], array)
    if found.topk is not None:
        assert places == found.topk.positions.tolist()
        np.testing.assert_array_equal(np.array(gaps, np.float32), found.topk.gaps)
    assert header["format"] == 4
    assert header["fingerprint"] == blueprint.fingerprint
    assert header["base"] == (turn or (1 << 64) - 1)
    if isinstance(found, Update):
        told = (header["kind"], header["version"], header["digest"], header["examples"])
        assert told == (2, found.version, found.reference, found.examples)
    else:
        assert (header["kind"], header["version"]) == (1, found.version)
        assert header["digest"] == digest(found.version, dense, places, gaps)
