"""A blob taken apart: header, named sections with lengths, checksum. What they mean is `vblora.wire`'s."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from vblora.errors import WireError

__all__ = ["FORMAT", "Encoding", "Header", "Kind", "Section", "read_blob", "section_bytes", "write_blob"]

MAGIC = b"FVBL"
FORMAT = 4
HEADER = struct.Struct("<4sHBB16sQ16sQ16sI")
MAX_AXES = 4
NO_BASE = (1 << 64) - 1


class Kind(IntEnum):
    """What a blob holds."""

    STATE = 1
    UPDATE = 2


class Encoding(IntEnum):
    """How a section's payload is written. docs/wire.md shows each byte by byte."""

    FLOAT32 = 1
    BFLOAT16 = 2
    STEPS = 3  # float32 step, lanes of whole steps
    GRID = 4  # exponent u8, lanes of whole multiples of 2^exponent grid steps from the base
    SELECTION = 5  # streams of the difference from the base's selection


@dataclass(frozen=True)
class Section:
    """One named array of a blob as it stands there, not yet decoded."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    payload: bytes | memoryview

    @property
    def count(self) -> int:
        """Numbers that the section stands for."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The fixed part of a blob.

    Attributes:
        kind: state or update.
        fingerprint: of the blueprint.
        version, digest: of the state in the blob; of an update, of the state it was trained from.
        base_version, base_digest: of the state that sections are differences from; version None without one.
        examples: of an update, else 0.
    """

    kind: Kind
    fingerprint: bytes
    version: int
    digest: bytes
    base_version: int | None = None
    base_digest: bytes = bytes(16)
    examples: int = 0


def write_blob(header: Header, sections: Sequence[Section]) -> bytes:
    """Put a blob together."""
    start = HEADER.pack(
        MAGIC,
        FORMAT,
        header.kind,
        len(sections),
        header.fingerprint,
        header.version,
        header.digest,
        NO_BASE if header.base_version is None else header.base_version,
        header.base_digest,
        header.examples,
    )
    body = b"".join([start, *map(_section_bytes, sections)])
    return body + zlib.crc32(body).to_bytes(4, "little")


def read_blob(blob: bytes) -> tuple[Header, list[Section]]:
    """Take a blob apart without knowing its blueprint.

    Raises:
        WireError: wrong magic, format, checksum or lengths.
    """
    if len(blob) < HEADER.size + 4:
        raise WireError(f"blob: {len(blob)} bytes, expected at least {HEADER.size + 4}; it is truncated")
    magic, form, kind, count, fingerprint, version, digest, base, base_digest, examples = HEADER.unpack_from(
        blob
    )
    if magic != MAGIC:
        raise WireError(f"blob: starts with {magic!r}, expected {MAGIC!r}; this is not a fed-vblora blob")
    if form != FORMAT:
        raise WireError(
            f"blob: format {form}, expected {FORMAT}; run the same fed-vblora version on both sides"
        )
    told, found = int.from_bytes(blob[-4:], "little"), zlib.crc32(memoryview(blob)[:-4])
    if told != found:
        raise WireError(
            f"blob: checksum {told:08x}, expected {found:08x}; it was truncated or altered on the way"
        )
    if kind not in list(Kind):
        raise WireError(f"blob: kind {kind}, expected one of {[int(k) for k in Kind]}")
    base_version = None if base == NO_BASE else base
    header = Header(Kind(kind), fingerprint, version, digest, base_version, base_digest, examples)
    return header, _split(memoryview(blob)[HEADER.size : -4], count)


def section_bytes(blob: bytes) -> dict[str, int]:
    """Bytes by section name, as they stand in the blob; "frame" is the header, section headers and checksum.

    Raises:
        WireError: as `read_blob`.
    """
    sizes = {section.name: len(section.payload) for section in read_blob(blob)[1]}
    return {**sizes, "frame": len(blob) - sum(sizes.values())}


def _section_bytes(section: Section) -> bytes:
    label, shape = section.name.encode("ascii"), section.shape
    form = f"<B{len(label)}sBB{len(shape)}IQ"
    start = struct.pack(form, len(label), label, section.encoding, len(shape), *shape, len(section.payload))
    return start + bytes(section.payload)


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
