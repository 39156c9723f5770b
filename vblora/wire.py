"""States and updates as bytes, and back, exactly. The page of the format is docs/wire.md.

Nothing is lost here: what was to be given up has been given up in `vblora.rounding`. Every section is written
in the smallest form that gives it back to the bit, so a state that lies on the grid travels as its difference
from one that the receiver holds, and any other travels whole. A section that does not differ from the base
is left out; the base of an update is the state that it was trained from. A selection without a base is told
from version 0's, which all can draw.

Nothing is allocated from a declared size before it was checked against the blueprint and the bytes at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vblora.entropy import LARGEST, Reader
from vblora.errors import UnknownStateError, WireError
from vblora.frame import Encoding, Header, Kind, Section, read_blob, write_blob
from vblora.lanes import decode_lanes, encode_lanes
from vblora.rounding import from_grid, on_grid
from vblora.selection import decode_selection, encode_selection
from vblora.spec import Blueprint
from vblora.state import State, TopK, Update, content_faults, initial_state

__all__ = ["decode_state", "decode_update", "encode_state", "encode_update", "initial"]

Floats = NDArray[np.float32]
MOST_EXPONENT = 31
BLOCK = 1 << 12  # numbers computed at once


@lru_cache(maxsize=4)
def initial(blueprint: Blueprint) -> State:
    """Version 0 of a blueprint, drawn once a process; treat it as read-only."""
    return initial_state(blueprint)


def encode_state(state: State, blueprint: Blueprint, base: State | None = None) -> bytes:
    """Write a state: whole, or as its difference from a `base` that the receiver holds.

    Version 0 has no sections: both sides draw it from the seed.
    """
    if state.version == 0:
        return write_blob(Header(Kind.STATE, blueprint.fingerprint, 0, state.digest), [])
    header = Header(
        Kind.STATE,
        blueprint.fingerprint,
        state.version,
        state.digest,
        None if base is None else base.version,
        bytes(16) if base is None else base.digest,
    )
    sections = list(_selection_section(state.topk, base, blueprint))
    for name in blueprint.dense_shapes:
        values = state.dense[name]
        if base is None:
            sections.append(_float_section(name, values))
        elif not _same(values, base.dense[name]):
            start = initial(blueprint).dense[name]
            sections.append(
                _grid_section(name, values, base.dense[name], start) or _float_section(name, values)
            )
    return write_blob(header, sections)


def decode_state(blob: bytes, blueprint: Blueprint, held: Mapping[bytes, State] | None = None) -> State:
    """Read a state and check it against the digest that it carries.

    Args:
        blob: what `encode_state` wrote.
        blueprint: of the adapter.
        held: states that a blob may build on, by digest; version 0 is always held.

    Raises:
        UnknownStateError: it builds on a state that is not held.
        WireError: the blob is damaged or of another adapter; its content is not what the digest names, or
            cannot be a state: a number that is not finite, a selection out of bounds.
    """
    header, sections = _read_for(blob, Kind.STATE, blueprint)
    if header.version == 0:
        if sections:
            raise WireError(f"state: version 0 with {len(sections)} sections, expected none: it is drawn")
        state = initial(blueprint)
    else:
        base = _base(header, blueprint, held or {})
        state = replace(_read_state(sections, blueprint, base), version=header.version)
    if state.digest != header.digest:
        raise WireError(f"state: content has digest {state.digest.hex()}, expected {header.digest.hex()}")
    if faults := list(content_faults(state.dense, state.topk, blueprint)):
        raise WireError("state: " + "; ".join(faults))
    return state


def encode_update(update: Update, blueprint: Blueprint, reference: State | None = None) -> bytes:
    """Write a client's update; `reference` is what it was trained from, None writes it whole."""
    header = Header(
        Kind.UPDATE,
        blueprint.fingerprint,
        update.version,
        update.reference,
        None if reference is None else reference.version,
        bytes(16) if reference is None else reference.digest,
        update.examples,
    )
    sections = list(_selection_section(update.topk, reference, blueprint))
    for name in blueprint.dense_shapes:
        change = update.dense[name]
        if reference is None or change.view(np.uint32).any():
            sections.append(_change_section(name, change, update.steps.get(name, 0.0)))
    return write_blob(header, sections)


def decode_update(blob: bytes, blueprint: Blueprint, reference: State | None = None) -> Update:
    """Read a client's update. Its numbers are not yet judged: see `vblora.state.check_update`.

    Raises:
        UnknownStateError: it was trained from another state than `reference`.
        WireError: the blob is damaged or of another adapter.
    """
    header, sections = _read_for(blob, Kind.UPDATE, blueprint)
    base = None
    if header.base_version is not None:
        base = _base(header, blueprint, {} if reference is None else {reference.digest: reference})
    dense, topk, steps = _read_changes(sections, blueprint, base)
    return Update(header.version, header.digest, header.examples, dense, topk, steps)


def _base(header: Header, blueprint: Blueprint, held: Mapping[bytes, State]) -> State | None:
    if header.base_version is None:
        return None
    found = held.get(header.base_digest)
    if found is None and header.base_version == 0 and initial(blueprint).digest == header.base_digest:
        return initial(blueprint)
    if found is None:
        versions = map(str, sorted({0, *(state.version for state in held.values())}))
        raise UnknownStateError(
            f"blob: builds on version {header.base_version} ({header.base_digest.hex()[:8]}), "
            f"expected one that is held: {', '.join(versions)}"
        )
    return found


def _selection_base(base: State | None, blueprint: Blueprint) -> TopK | None:
    """What a selection is told from: the base's, or version 0's."""
    return (initial(blueprint) if base is None else base).topk


def _read_for(blob: bytes, kind: Kind, blueprint: Blueprint) -> tuple[Header, list[Section]]:
    header, sections = read_blob(blob)
    if header.kind is not kind:
        raise WireError(f"blob: is of kind {header.kind.name.lower()}, expected {kind.name.lower()}")
    if header.fingerprint != blueprint.fingerprint:
        found, expected = header.fingerprint.hex()[:12], blueprint.fingerprint.hex()[:12]
        raise WireError(
            f"blob: made for adapter {found}, expected {expected}; "
            "base model, targets, rank, h, b, k, seed and labels must be the same on both sides"
        )
    return header, sections


# --- Writing -------------------------------------------------------------------------


def _selection_section(topk: TopK | None, base: State | None, blueprint: Blueprint) -> Iterator[Section]:
    start = _selection_base(base, blueprint)
    if topk is None or start is None or blueprint.topk_shape is None:
        return
    if not (_same(topk.positions, start.positions) and _same(topk.gaps, start.gaps)):
        payload = encode_selection(topk, start, blueprint.topk_shape[2])
        yield Section("selection", Encoding.SELECTION, topk.positions.shape, payload)


def _float_section(name: str, array: Floats) -> Section:
    return Section(name, Encoding.FLOAT32, array.shape, np.ascontiguousarray(array, "<f4").tobytes())


def _grid_section(name: str, values: Floats, base: Floats, start: Floats) -> Section | None:
    """The difference of two arrays on the grid, or None where one is not, or they lie too far apart."""
    new, old = on_grid(values, start), on_grid(base, start)
    if new is None or old is None:
        return None
    change = new - old
    exponent = _common_exponent(change)
    if int(np.abs(change).max(initial=0)) >> exponent > LARGEST:
        return None
    payload = bytes([exponent]) + encode_lanes(change >> exponent)
    return Section(name, Encoding.GRID, values.shape, payload)


def _common_exponent(change: NDArray[np.int64]) -> int:
    """The largest e for which every number is a multiple of 2^e; 0 where all are 0."""
    bits = int(np.bitwise_or.reduce(change.reshape(-1), initial=0))
    return (bits & -bits).bit_length() - 1 if bits else 0


def _change_section(name: str, change: Floats, step: float) -> Section:
    if step:
        payload = np.array(step, "<f4").tobytes() + encode_lanes(np.rint(change / np.float32(step)))
        return Section(name, Encoding.STEPS, change.shape, payload)
    bits = np.ascontiguousarray(change, "<f4").view("<u4")
    if not (bits & 0xFFFF).any():
        return Section(name, Encoding.BFLOAT16, change.shape, (bits >> 16).astype("<u2").tobytes())
    return _float_section(name, change)


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """To the bit; 4 bytes a number."""
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))


# --- Reading -------------------------------------------------------------------------


def _read_state(sections: list[Section], blueprint: Blueprint, base: State | None) -> State:
    """The content of a state; its version is the caller's to set."""
    found = _named(sections, blueprint, base)
    dense = {}
    for name, shape in blueprint.dense_shapes.items():
        old = None if base is None else base.dense[name]
        if name in found:
            dense[name] = _values(found[name], shape, old, blueprint)
        elif old is not None:
            dense[name] = old
    return State(0, dense, _read_topk(found, blueprint, base))


def _read_changes(
    sections: list[Section], blueprint: Blueprint, base: State | None
) -> tuple[dict[str, Floats], TopK | None, dict[str, float]]:
    """The content of an update: changes, selection, steps."""
    found = _named(sections, blueprint, base)
    dense, steps = {}, {}
    for name, shape in blueprint.dense_shapes.items():
        dense[name] = _change(found[name], shape) if name in found else np.zeros(shape, np.float32)
        if name in found and found[name].encoding is Encoding.STEPS:
            steps[name] = float(np.frombuffer(found[name].payload, "<f4", 1)[0])
    return dense, _read_topk(found, blueprint, base), steps


def _named(sections: list[Section], blueprint: Blueprint, base: State | None) -> dict[str, Section]:
    """Sections by name: none twice, none unknown, and without a base none missing."""
    found = {section.name: section for section in sections}
    known = {*blueprint.dense_shapes, *(("selection",) if blueprint.topk_shape else ())}
    required = blueprint.dense_shapes.keys() if base is None else set()
    if len(found) < len(sections) or not required <= found.keys() <= known:
        names = [section.name for section in sections]
        raise WireError(f"blob: sections are {names}, expected {sorted(known)}, each once")
    return found


def _read_topk(found: Mapping[str, Section], blueprint: Blueprint, base: State | None) -> TopK | None:
    start = _selection_base(base, blueprint)
    if start is None or blueprint.topk_shape is None or "selection" not in found:
        return start
    rows, k, h = blueprint.topk_shape
    _expect(found["selection"], Encoding.SELECTION, (rows, k))
    return decode_selection(found["selection"].payload, start, h)


def _values(section: Section, shape: tuple[int, ...], base: Floats | None, blueprint: Blueprint) -> Floats:
    """A state's section: whole, or a difference on the grid."""
    if base is None or section.encoding is Encoding.FLOAT32:
        return _floats(section, shape)
    _expect(section, Encoding.GRID, shape)
    data = Reader(section.payload)
    exponent = data.take(1)[0]
    if exponent > MOST_EXPONENT:
        raise WireError(
            f"blob: section {section.name} has exponent {exponent}, expected 0 to {MOST_EXPONENT}"
        )
    change = decode_lanes(data, math.prod(shape))
    data.finish()
    start, old = initial(blueprint).dense[section.name].reshape(-1), base.reshape(-1)
    values = np.empty(change.size, np.float32)
    for at in range(0, change.size, BLOCK):
        block = slice(at, at + BLOCK)
        held = on_grid(old[block], start[block])
        if held is None:
            raise WireError(f"blob: section {section.name} is a difference, but its base is off the grid")
        values[block] = from_grid(start[block], held + (change[block].astype(np.int64) << exponent))
    return values.reshape(shape)


def _change(section: Section, shape: tuple[int, ...]) -> Floats:
    """An update's section."""
    if section.encoding is Encoding.STEPS:
        _expect(section, Encoding.STEPS, shape)
        data = Reader(section.payload)
        step = np.frombuffer(data.take(4), "<f4")[0]
        change = decode_lanes(data, math.prod(shape)).astype(np.float32).reshape(shape)
        data.finish()
        with np.errstate(all="ignore"):  # whatever comes of any step is judged later
            change *= step
        return change
    if section.encoding is Encoding.BFLOAT16:
        _expect(section, Encoding.BFLOAT16, shape, 2 * math.prod(shape))
        bits = np.frombuffer(section.payload, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return _floats(section, shape)


def _floats(section: Section, shape: tuple[int, ...]) -> Floats:
    _expect(section, Encoding.FLOAT32, shape, 4 * math.prod(shape))
    return np.frombuffer(section.payload, "<f4").astype(np.float32).reshape(shape)


def _expect(section: Section, encoding: Encoding, shape: tuple[int, ...], length: int | None = None) -> None:
    if section.shape != shape:
        raise WireError(f"blob: section {section.name} has shape {section.shape}, expected {shape}")
    if section.encoding is not encoding:
        raise WireError(f"blob: section {section.name} is {section.encoding.name}, expected {encoding.name}")
    if length is not None and len(section.payload) != length:
        raise WireError(f"blob: section {section.name} has {len(section.payload)} bytes, expected {length}")
