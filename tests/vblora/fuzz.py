"""What reading a blob does with anything. `run_fuzz.py` looks for inputs, `test_fuzz.py` tries `corpus/`.

A blob is read with the adapter that its fingerprint names, by someone who holds the golden blobs' bases. Only
our own errors may come of it, in little time and little memory. Blobs are changed inside their sections and
sealed again, or nothing would get past the checksum.
"""

from __future__ import annotations

import random
import tracemalloc
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from tests.vblora.make_golden import BLUEPRINT, GOLDEN_BLOBS, make_reference, read_golden
from vblora.errors import UpdateError, WireError
from vblora.frame import HEADER, Kind, Section, read_blob, write_blob
from vblora.spec import Blueprint
from vblora.state import State, Update, check_update
from vblora.wire import decode_state, decode_update, encode_state, encode_update

__all__ = ["CORPUS", "change", "declared", "run_one", "sealed", "seeds"]

CORPUS = Path(__file__).with_name("corpus")
BLUEPRINTS = {blueprint.fingerprint: blueprint for blueprint, _ in GOLDEN_BLOBS.values()}
TIMES, ROOM = 4, 1 << 20  # memory that reading may take: times what the adapter's state takes, and some room
LARGEST_INPUT = 1 << 13


def run_one(blob: bytes) -> str:
    """Read one blob; says what came of it. Memory is looked at while `tracemalloc` is on.

    Raises:
        Exception: anything that is not our own way of refusing it, memory among it.
    """
    blueprint = BLUEPRINTS.get(blob[8:24], BLUEPRINT)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        try:
            found = _read(blob, blueprint)
        except WireError as error:
            found = _with_its_own_digest(blob, blueprint, str(error))
    except WireError as error:
        return str(error)
    finally:
        peak, limit = tracemalloc.get_traced_memory()[1] - before, TIMES * declared(blueprint) + ROOM
        if peak > limit:
            raise MemoryError(f"{peak} bytes, expected {limit} at most")
    return _use(found, blueprint)


def declared(blueprint: Blueprint) -> int:
    """Bytes of a state as it lies in memory."""
    rows, k, _ = blueprint.topk_shape or (0, 1, 0)
    return 4 * (sum(map(int, map(np.prod, blueprint.dense_shapes.values()))) + rows * (2 * k - 1))


@lru_cache(maxsize=1)
def seeds() -> dict[str, bytes]:
    """A sound blob of each kind."""
    return {name: read_golden(name)[0] for name in sorted(GOLDEN_BLOBS)}


def sealed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def change(blob: bytes, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """Another blob: changed inside a section, in the frame, or anywhere, and sealed again."""
    draw = random.Random(seed)
    try:
        header, sections = read_blob(blob)
    except WireError:
        if draw.random() < 0.5 or len(blob) < HEADER.size + 4:  # start over from a sound one
            return draw.choice(list(seeds().values()))
        return sealed(mutate(blob[:-4], LARGEST_INPUT))
    if not sections or draw.random() < 0.1:
        return sealed(blob[:6] + mutate(blob[6:-4], LARGEST_INPUT))
    at = draw.randrange(len(sections))
    old = sections[at]
    payload = mutate(bytes(old.payload), min(LARGEST_INPUT, 2 * len(old.payload) + 64))
    sections[at] = Section(old.name, old.encoding, old.shape, payload)
    if draw.random() < 0.1:
        draw.shuffle(sections)
    return write_blob(header, sections)


def _read(blob: bytes, blueprint: Blueprint) -> State | Update:
    """As whoever holds the first states of that adapter."""
    held = {state.digest: state for state in map(partial(make_reference, blueprint), (1, 2))}
    if blob[6:7] == bytes([Kind.STATE]):
        return decode_state(blob, blueprint, held)
    return decode_update(blob, blueprint, make_reference(blueprint, 2))


def _with_its_own_digest(blob: bytes, blueprint: Blueprint, fault: str) -> State | Update:
    """A state that only its digest keeps out, read again with the one that its content has."""
    told = "state: content has digest "
    if not fault.startswith(told):
        raise WireError(fault)
    digest = bytes.fromhex(fault.removeprefix(told)[:32])
    return _read(sealed(blob[:32] + digest + blob[48:-4]), blueprint)


def _use(found: State | Update, blueprint: Blueprint) -> str:
    """What is accepted can be written and read again."""
    base = make_reference(blueprint, 2)
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
