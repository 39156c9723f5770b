"""Blobs that are damaged, forged or of something else."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vblora.make_golden import (
    BLUEPRINT,
    GOLDEN_BLOBS,
    make_state,
    read_as,
    read_golden,
)
from tests.vblora.test_wire import DECODERS, KINDS, STATE, UPDATE, same, sealed
from vblora.errors import WireError
from vblora.frame import FORMAT, HEADER, Encoding, Kind, read_blob
from vblora.state import State, initial_state
from vblora.wire import decode_state, decode_update, encode_state

# --- Damage --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_BLOBS)
def test_a_part_of_a_blob_is_refused(name):
    blob = read_golden(name)[0]
    for length in range(len(blob)):
        with pytest.raises(WireError, match=r"^blob: .*(truncated|format)"):
            read_as(name, blob[:length])
    for more in (b"\0", blob):
        with pytest.raises(
            WireError, match=r"checksum [0-9a-f]{8}, expected [0-9a-f]{8}; it was truncated or altered"
        ):
            read_as(name, blob + more)


@pytest.mark.parametrize("name", GOLDEN_BLOBS)
def test_a_flipped_bit_is_refused(name):
    blob = read_golden(name)[0]
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError, match=r"^blob: .*(checksum|format \d+, expected|expected b'FVBL')"):
            read_as(name, bytes(damaged))


@pytest.mark.parametrize("name", GOLDEN_BLOBS)
@pytest.mark.parametrize("version", [0, FORMAT - 1, FORMAT + 1, 65535])
def test_another_format_is_refused_by_its_number(name, version):
    blob = read_golden(name)[0]
    other = blob[:4] + version.to_bytes(2, "little") + blob[6:-4]
    with pytest.raises(WireError, match=f"^blob: format {version}, expected {FORMAT}; run the same"):
        read_as(name, sealed(other))


@KINDS
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_what_is_altered_and_sealed_again_raises_nothing_else(kind, data):
    """Someone who can write a checksum gets a `WireError`, or numbers of the right shape."""
    blob, decode = DECODERS[kind]
    body = bytearray(blob[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        action = data.draw(st.sampled_from(["set", "drop", "add"]))
        byte = data.draw(st.sampled_from([0, 1, 2, 4, 127, 128, 255]))
        if action == "set":
            body[at] = byte
        elif action == "drop":
            del body[at]
        else:
            body.insert(at, byte)
    try:
        found = decode(sealed(bytes(body)), BLUEPRINT)
    except WireError:
        return
    assert {name: array.shape for name, array in found.dense.items()} == BLUEPRINT.dense_shapes
    if kind == "state":
        assert same(found, make_state())


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    for _, decode in DECODERS.values():
        for blob in (noise, sealed(STATE[: HEADER.size] + noise), sealed(UPDATE[: HEADER.size] + noise)):
            with pytest.raises(WireError):
                decode(blob, BLUEPRINT)


def header(**change: object) -> bytes:
    names = [
        "magic",
        "format",
        "kind",
        "sections",
        "fingerprint",
        "version",
        "digest",
        "base",
        "base_digest",
        "examples",
    ]
    values = dict(zip(names, HEADER.unpack_from(UPDATE), strict=True))
    return HEADER.pack(*{**values, **change}.values())


def section(
    name: bytes, encoding: int, shape: tuple[int, ...], payload: bytes, length: int | None = None
) -> bytes:
    start = struct.pack(f"<B{len(name)}sBB", len(name), name, encoding, len(shape) % 256)
    declared = len(payload) if length is None else length
    return start + struct.pack(f"<{len(shape)}IQ", *shape, declared) + payload


def parts(**change: bytes) -> bytes:
    """The golden update's sections, some replaced."""
    made = {
        held.name: section(held.name.encode(), held.encoding, held.shape, bytes(held.payload))
        for held in read_blob(UPDATE)[1]
    }
    return b"".join({**made, **change}.values())


def test_the_helpers_above_rebuild_the_golden_blob():
    assert sealed(header() + parts()) == UPDATE


ROWS = BLUEPRINT.rows
FLOAT, GRID, CHOSEN = Encoding.FLOAT32, Encoding.GRID, Encoding.SELECTION
REFUSED = {
    "nothing": (b"", "0 bytes, expected at least 80; it is truncated"),
    "magic": (sealed(header(magic=b"FVBM") + parts()), "starts with b'FVBM', expected b'FVBL'"),
    "format": (
        sealed(header(format=FORMAT + 1) + parts()),
        f"format {FORMAT + 1}, expected {FORMAT}; run the",
    ),
    "checksum": (header() + parts() + b"abcd", "checksum 64636261, expected [0-9a-f]{8}; it was"),
    "kind unknown": (sealed(header(kind=9) + parts()), r"kind 9, expected one of \[1, 2\]"),
    "kind other": (sealed(header(kind=Kind.STATE) + parts()), "is of kind state, expected update"),
    "fingerprint": (
        sealed(header(fingerprint=b"f" * 16) + parts()),
        "made for adapter 666666666666, expected [0-9a-f]{12}; base model, targets",
    ),
    "no sections": (
        sealed(header(sections=0)),
        r"sections are \[\], expected \['bank', 'head', 'selection'\], each once",
    ),
    "sections declared, none there": (sealed(header(sections=255)), "section 1 of 255 is not readable"),
    "one more declared": (sealed(header(sections=4) + parts()), "section 4 of 4 is not readable"),
    "one less declared": (sealed(header(sections=2) + parts()), "bytes after the last section"),
    "one missing": (sealed(header(sections=2) + parts(head=b"")), "sections are"),
    "one twice": (
        sealed(header(sections=4) + parts() + section(b"head", FLOAT, (10,), bytes(40))),
        "expected .*, each once",
    ),
    "one instead of another": (
        sealed(header() + parts(head=section(b"bank", FLOAT, (6, 4), bytes(96)))),
        "expected .*, each once",
    ),
    "unknown": (sealed(header() + parts(head=section(b"hats", FLOAT, (10,), bytes(40)))), "sections are"),
    "unnamed": (sealed(header() + parts(head=section(b"", FLOAT, (10,), bytes(40)))), "sections are"),
    "name not ascii": (
        sealed(header() + parts(head=section(b"h\xffad", FLOAT, (10,), bytes(40)))),
        "section 3 of 3 is not readable",
    ),
    "encoding unknown": (
        sealed(header() + parts(head=section(b"head", 77, (10,), bytes(40)))),
        "section 3 of 3 is not readable",
    ),
    "encoding other": (
        sealed(header() + parts(head=section(b"head", GRID, (10,), bytes(40)))),
        "section head is GRID, expected FLOAT32",
    ),
    "selection as floats": (
        sealed(header() + parts(selection=section(b"selection", FLOAT, (ROWS, 2), bytes(8 * ROWS)))),
        "section selection is FLOAT32, expected SELECTION",
    ),
    "shape": (
        sealed(header() + parts(bank=section(b"bank", FLOAT, (4, 6), bytes(96)))),
        r"section bank has shape \(4, 6\), expected \(6, 4\)",
    ),
    "no axes": (
        sealed(header() + parts(head=section(b"head", FLOAT, (), bytes(40)))),
        r"section head has shape \(\), expected \(10,\)",
    ),
    "axes": (
        sealed(header() + parts(head=section(b"head", FLOAT, (1,) * 255, bytes(40)))),
        "section head has 255 axes, expected at most 4",
    ),
    "payload short": (
        sealed(header() + parts(head=section(b"head", FLOAT, (10,), bytes(39)))),
        "section head has 39 bytes, expected 40",
    ),
    "payload long": (
        sealed(header() + parts(bank=section(b"bank", FLOAT, (6, 4), bytes(97)))),
        "section bank has 97 bytes, expected 96",
    ),
    "length beyond the end": (
        sealed(header() + parts(head=section(b"head", FLOAT, (10,), bytes(40), 41))),
        "section head declares 41 bytes, 40 are left",
    ),
    "length of 2^64 - 1": (
        sealed(header() + parts(head=section(b"head", FLOAT, (10,), bytes(40), (1 << 64) - 1))),
        "section head declares 18446744073709551615 bytes, 40 are left",
    ),
    "shape of 2^128": (
        sealed(header() + parts(bank=section(b"bank", FLOAT, ((1 << 32) - 1,) * 4, bytes(96)))),
        r"section bank has shape \(4294967295, ",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_blob_is_refused_in_words_and_allocates_nothing(kind):
    blob, fault = REFUSED[kind]
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=fault):
            decode_update(blob, BLUEPRINT)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "change",
    [
        {"spec": replace(BLUEPRINT.spec, seed=12)},
        {"labels": ("b", "a")},
        {"model": "toy-5"},
        {"linears": BLUEPRINT.linears[::-1]},
    ],
)
def test_a_blob_of_another_adapter_is_refused(change):
    other = replace(BLUEPRINT, **change)
    for blob, decode in DECODERS.values():
        with pytest.raises(WireError, match="made for adapter"):
            decode(blob, other)


def test_a_state_that_is_not_what_its_digest_names_is_refused():
    blob = bytearray(STATE[:-4])
    blob[-1] ^= 1
    with pytest.raises(WireError, match=r"content has digest [0-9a-f]{32}, expected"):
        decode_state(sealed(bytes(blob)), BLUEPRINT)
    start = bytearray(encode_state(initial_state(BLUEPRINT), BLUEPRINT)[:-4])
    start[32] ^= 1  # version 0 is drawn, not sent: its digest still has to fit
    with pytest.raises(WireError, match="content has digest"):
        decode_state(sealed(bytes(start)), BLUEPRINT)


def _state(dense: dict | None = None, **topk: np.ndarray) -> State:
    state = make_state()
    return replace(state, dense={**state.dense, **(dense or {})}, topk=replace(state.topk, **topk))


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        (_state({"bank": np.full((6, 4), np.nan, np.float32)}), "bank holds 24 numbers that are not finite"),
        (_state(gaps=np.full((ROWS, 1), -1, np.float32)), "gaps are not rising"),
    ],
)
def test_a_state_that_no_client_could_load_is_refused(state, fault):
    """Its digest fits, a server made it so. Places out of range or named twice cannot even be written."""
    with pytest.raises(WireError, match=f"^state: .*{fault}"):
        decode_state(encode_state(state, BLUEPRINT), BLUEPRINT)
