"""One blob a direction: header, sections with lengths, checksum. The page of the format is docs/wire.md.

All integers are little-endian.

    magic 4 | format u16 | kind u8 | sections u8 | fingerprint 16 | version u64 | reference 16 | examples u32
    then for each section: name u8+bytes | encoding u8 | axes u8 | axis u32 ... | length u64 | payload
    then crc32 u32 of all before it

Nothing is allocated from a declared size before it was checked against the blueprint and against the bytes at
hand.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from vblora.errors import WireError
from vblora.packing import index_bits, pack_integers, packed_size, unpack_integers
from vblora.spec import Blueprint
from vblora.state import State, TopK, Update, content_faults, initial_state

__all__ = [
    "FORMAT",
    "Kind",
    "Section",
    "decode_state",
    "decode_update",
    "encode_state",
    "encode_update",
    "read_sections",
    "section_bytes",
]

MAGIC = b"FVBL"
FORMAT = 1
HEADER = struct.Struct("<4sHBB16sQ16sI")
MAX_AXES = 4


class Kind(IntEnum):
    """What a blob holds."""

    STATE = 1
    UPDATE = 2


class Encoding(IntEnum):
    """How a section's payload is written."""

    FLOAT32 = 1
    PACKED = 2  # unsigned integers of ceil(log2 h) bits each, least significant bit first


@dataclass(frozen=True)
class Section:
    """One named array of a blob as it stands there, not yet decoded."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    payload: memoryview

    @property
    def count(self) -> int:
        """Numbers that the section stands for."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The fixed part of a blob."""

    kind: Kind
    fingerprint: bytes
    version: int
    reference: bytes
    examples: int


def encode_state(state: State, blueprint: Blueprint) -> bytes:
    """Write a reference state. Version 0 has no sections: both sides draw it from the seed."""
    header = Header(Kind.STATE, blueprint.fingerprint, state.version, state.digest, 0)
    return _write(header, [] if state.version == 0 else _sections(state.dense, state.topk, blueprint))


def encode_update(update: Update, blueprint: Blueprint) -> bytes:
    """Write a client's update, lossless."""
    header = Header(Kind.UPDATE, blueprint.fingerprint, update.version, update.reference, update.examples)
    return _write(header, _sections(update.dense, update.topk, blueprint))


def decode_state(blob: bytes, blueprint: Blueprint) -> State:
    """Read a reference state and check it against the digest that it carries.

    Raises:
        WireError: the blob is damaged or of another adapter; its content is not what the digest names, or
            cannot be a state: a number that is not finite, a selection out of bounds.
    """
    header, sections = _read_for(blob, Kind.STATE, blueprint)
    if header.version == 0 and not sections:
        state = initial_state(blueprint)
    else:
        dense, topk = _arrays(sections, blueprint)
        state = State(header.version, dense, topk)
    if state.digest != header.reference:
        raise WireError(f"state: content has digest {state.digest.hex()}, expected {header.reference.hex()}")
    if faults := list(content_faults(state.dense, state.topk, blueprint)):
        raise WireError("state: " + "; ".join(faults))
    return state


def decode_update(blob: bytes, blueprint: Blueprint) -> Update:
    """Read a client's update. Its numbers are not yet judged: see `vblora.state.check_update`.

    Raises:
        WireError: the blob is damaged or of another adapter.
    """
    header, sections = _read_for(blob, Kind.UPDATE, blueprint)
    dense, topk = _arrays(sections, blueprint)
    return Update(header.version, header.reference, header.examples, dense, topk)


def read_sections(blob: bytes) -> tuple[Header, list[Section]]:
    """Take a blob apart without knowing its blueprint.

    Raises:
        WireError: wrong magic, format, checksum or lengths.
    """
    if len(blob) < HEADER.size + 4:
        raise WireError(f"blob: {len(blob)} bytes, expected at least {HEADER.size + 4}; it is truncated")
    magic, form, kind, count, fingerprint, version, reference, examples = HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise WireError(f"blob: starts with {magic!r}, expected {MAGIC!r}; this is not a fed-vblora blob")
    if form != FORMAT:
        raise WireError(
            f"blob: format {form}, expected {FORMAT}; run the same fed-vblora version on both sides"
        )
    if zlib.crc32(memoryview(blob)[:-4]) != int.from_bytes(blob[-4:], "little"):
        raise WireError("blob: checksum does not match; it was truncated or altered on the way")
    try:
        header = Header(Kind(kind), fingerprint, version, reference, examples)
    except ValueError as error:
        raise WireError(f"blob: kind {kind}, expected one of {[int(k) for k in Kind]}") from error
    return header, _split(memoryview(blob)[HEADER.size : -4], count)


def _split(body: memoryview, count: int) -> list[Section]:
    sections = []
    try:
        for _ in range(count):
            name_length = body[0]
            name = bytes(body[1 : 1 + name_length]).decode("ascii")
            encoding, axes = Encoding(body[1 + name_length]), body[2 + name_length]
            if axes > MAX_AXES:
                raise WireError(f"blob: section {name} has {axes} axes, expected at most {MAX_AXES}")
            at = 3 + name_length
            *shape, length = struct.unpack_from(f"<{axes}IQ", body, at)
            body = body[at + 4 * axes + 8 :]
            if length > len(body):
                raise WireError(f"blob: section {name} declares {length} bytes, {len(body)} are left")
            sections.append(Section(name, encoding, tuple(shape), body[:length]))
            body = body[length:]
    except (IndexError, ValueError, struct.error) as error:
        raise WireError(f"blob: section {len(sections) + 1} of {count} is not readable ({error})") from error
    if len(body):
        raise WireError(f"blob: {len(body)} bytes after the last section")
    return sections


def _read_for(blob: bytes, kind: Kind, blueprint: Blueprint) -> tuple[Header, list[Section]]:
    header, sections = read_sections(blob)
    if header.kind is not kind:
        raise WireError(f"blob: holds a {header.kind.name.lower()}, expected a {kind.name.lower()}")
    if header.fingerprint != blueprint.fingerprint:
        found, expected = header.fingerprint.hex()[:12], blueprint.fingerprint.hex()[:12]
        raise WireError(
            f"blob: made for adapter {found}, expected {expected}; "
            "base model, targets, rank, h, b, k, seed and labels must be the same on both sides"
        )
    return header, sections


def _write(header: Header, sections: list[bytes]) -> bytes:
    start = HEADER.pack(
        MAGIC,
        FORMAT,
        header.kind,
        len(sections),
        header.fingerprint,
        header.version,
        header.reference,
        header.examples,
    )
    body = b"".join([start, *sections])
    return body + zlib.crc32(body).to_bytes(4, "little")


def _sections(
    dense: Mapping[str, NDArray[np.float32]], topk: TopK | None, blueprint: Blueprint
) -> list[bytes]:
    arrays = []
    if topk is not None and blueprint.topk_shape is not None:
        packed = pack_integers(topk.positions, index_bits(blueprint.topk_shape[2]))
        arrays.append(_section("positions", Encoding.PACKED, topk.positions.shape, packed))
        arrays.append(_section("gaps", Encoding.FLOAT32, topk.gaps.shape, _float_bytes(topk.gaps)))
    for name in blueprint.dense_shapes:
        arrays.append(_section(name, Encoding.FLOAT32, dense[name].shape, _float_bytes(dense[name])))
    return arrays


def _section(name: str, encoding: Encoding, shape: tuple[int, ...], payload: bytes) -> bytes:
    label = name.encode("ascii")
    start = struct.pack(
        f"<B{len(label)}sBB{len(shape)}IQ", len(label), label, encoding, len(shape), *shape, len(payload)
    )
    return start + payload


def _float_bytes(array: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(array, "<f4").tobytes()


def _arrays(
    sections: list[Section], blueprint: Blueprint
) -> tuple[dict[str, NDArray[np.float32]], TopK | None]:
    """Decode sections into arrays of exactly the shapes that the blueprint names."""
    found = {section.name: section for section in sections}
    expected = [*blueprint.dense_shapes, *(["positions", "gaps"] if blueprint.topk_shape else [])]
    if sorted(section.name for section in sections) != sorted(expected):
        raise WireError(
            f"blob: sections are {[s.name for s in sections]}, expected {sorted(expected)}, each once"
        )
    dense = {name: _floats(found[name], shape) for name, shape in blueprint.dense_shapes.items()}
    if blueprint.topk_shape is None:
        return dense, None
    rows, k, h = blueprint.topk_shape
    positions = _packed(found["positions"], (rows, k), index_bits(h))
    return dense, TopK(positions, _floats(found["gaps"], (rows, k - 1)))


def _floats(section: Section, shape: tuple[int, ...]) -> NDArray[np.float32]:
    _expect(section, Encoding.FLOAT32, shape, 4 * math.prod(shape))
    return np.frombuffer(section.payload, "<f4").astype(np.float32).reshape(shape)


def _packed(section: Section, shape: tuple[int, ...], bits: int) -> NDArray[np.int32]:
    count = math.prod(shape)
    _expect(section, Encoding.PACKED, shape, packed_size(count, bits))
    return unpack_integers(section.payload, count, bits).reshape(shape)


def _expect(section: Section, encoding: Encoding, shape: tuple[int, ...], length: int) -> None:
    if section.shape != shape:
        raise WireError(f"blob: section {section.name} has shape {section.shape}, expected {shape}")
    if section.encoding is not encoding:
        raise WireError(f"blob: section {section.name} is {section.encoding.name}, expected {encoding.name}")
    if len(section.payload) != length:
        raise WireError(f"blob: section {section.name} has {len(section.payload)} bytes, expected {length}")


def section_bytes(blob: bytes) -> dict[str, int]:
    """Bytes by section name, as they stand in the blob; "frame" is the header, section headers and checksum.

    Raises:
        WireError: as `read_sections`.
    """
    sizes = {section.name: len(section.payload) for section in read_sections(blob)[1]}
    return {**sizes, "frame": len(blob) - sum(sizes.values())}
