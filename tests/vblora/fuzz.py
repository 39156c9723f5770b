"""What reading a blob does with anything. `run_fuzz.py` looks for inputs, `test_fuzz.py` tries `corpus/`.

An input is the number of a golden blob's kind and a blob. It is read as that kind would be, with its
adapter and its base. Only our own errors may come of it, in little time and little memory. Inputs are
changed inside their sections and sealed again, or nothing would get past the checksum.
"""

from __future__ import annotations

import random
import tracemalloc
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from tests.vblora.make_golden import GOLDEN_BLOBS, make_reference, read_as, read_golden
from vblora.errors import UpdateError, WireError
from vblora.frame import HEADER, Section, read_blob, write_blob
from vblora.spec import Blueprint
from vblora.state import State, Update, check_update
from vblora.wire import decode_state, encode_state, encode_update, initial

__all__ = ["CORPUS", "change", "declared", "run_one", "sealed", "seeds"]

CORPUS = Path(__file__).with_name("corpus")
NAMES = sorted(GOLDEN_BLOBS)
TIMES, ROOM = 4, 1 << 20  # memory that reading may take: times what the adapter's state takes, and some room
LARGEST_INPUT = 1 << 13


def run_one(data: bytes) -> str:
    """Read one input; says what came of it. Memory is looked at while `tracemalloc` is on.

    Raises:
        Exception: anything that is not our own way of refusing it, memory among it.
    """
    name, blob = NAMES[(data[0] if data else 0) % len(NAMES)], bytes(data[1:])
    blueprint, turn = GOLDEN_BLOBS[name]
    base = make_reference(blueprint, turn) if turn else initial(blueprint)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        try:
            found = read_as(name, blob)
        except WireError as error:
            found = _with_its_own_digest(name, blob, str(error))
    except WireError as error:
        return str(error)
    finally:
        peak, limit = tracemalloc.get_traced_memory()[1] - before, TIMES * declared(blueprint) + ROOM
        if peak > limit:
            raise MemoryError(f"{peak} bytes, expected {limit} at most")
    return _use(found, blueprint, base)


def declared(blueprint: Blueprint) -> int:
    """Bytes of a state as it lies in memory."""
    rows, k, _ = blueprint.topk_shape or (0, 1, 0)
    return 4 * (sum(map(int, map(np.prod, blueprint.dense_shapes.values()))) + rows * (2 * k - 1))


@lru_cache(maxsize=1)
def seeds() -> dict[str, bytes]:
    """An input of each kind."""
    return {name: bytes([at]) + read_golden(name)[0] for at, name in enumerate(NAMES)}


def sealed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def change(data: bytes, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """Another input of the same kind: inside a section, the frame, or anywhere."""
    draw = random.Random(seed)
    kind, blob = (data[:1] or b"\0"), data[1:]
    try:
        header, sections = read_blob(blob)
    except WireError:
        if draw.random() < 0.5 or len(blob) < HEADER.size + 4:  # start over from a sound one
            return bytes([draw.randrange(len(NAMES))]) + seeds()[draw.choice(NAMES)][1:]
        return kind + sealed(mutate(blob[:-4], LARGEST_INPUT))
    if not sections or draw.random() < 0.1:
        return kind + sealed(blob[:6] + mutate(blob[6:-4], LARGEST_INPUT))
    at = draw.randrange(len(sections))
    old = sections[at]
    payload = mutate(bytes(old.payload), min(LARGEST_INPUT, 2 * len(old.payload) + 64))
    sections[at] = Section(old.name, old.encoding, old.shape, payload)
    if draw.random() < 0.1:
        draw.shuffle(sections)
    return kind + write_blob(header, sections)


def _with_its_own_digest(name: str, blob: bytes, fault: str) -> State | Update:
    """A state that only its digest keeps out, read again with the one that its content has."""
    told = "state: content has digest "
    if not fault.startswith(told):
        raise WireError(fault)
    digest = bytes.fromhex(fault.removeprefix(told)[:32])
    return read_as(name, sealed(blob[:32] + digest + blob[48:-4]))


def _use(found: State | Update, blueprint: Blueprint, base: State) -> str:
    """What is accepted can be written and read again."""
    if isinstance(found, State):
        blob = encode_state(found, blueprint, base)
        assert decode_state(blob, blueprint, {base.digest: base}).digest == found.digest
        return "accepted"
    try:
        check_update(found, blueprint, base)
    except UpdateError as error:
        return str(error)
    whole = [np.abs(found.dense[name]).max() / step for name, step in found.steps.items()]
    if max(whole, default=0.0) < 1 << 20:
        encode_update(found, blueprint, base)
    return "accepted"
