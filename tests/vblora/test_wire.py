"""Bytes: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.aggregate import aggregate
from tests.vblora.make_golden import (
    BLUEPRINT,
    GOLDEN,
    GOLDEN_BLOBS,
    GOLDEN_WIRES,
    content_digest,
    make_reference,
    make_rounded,
    make_state,
    make_update,
    read_golden,
)
from vblora.errors import UnknownStateError, WireError
from vblora.frame import HEADER, Encoding, Kind, read_blob, section_bytes
from vblora.gaps import GAPS
from vblora.lanes import ALONG, PLAIN
from vblora.rounding import WIRES, WireSettings, round_state, round_update
from vblora.spec import (
    AdapterSpec,
    Blueprint,
    FFALoRASpec,
    Linear,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
    VBLoRASpec,
)
from vblora.state import State, TopK, Update, check_update, initial_state
from vblora.wire import decode_state, decode_update, encode_state, encode_update, initial

STATE, UPDATE = encode_state(make_state(), BLUEPRINT), encode_update(make_update(), BLUEPRINT)
DECODERS: dict[str, tuple[bytes, Callable[[bytes, Blueprint], State | Update]]] = {
    "state": (STATE, decode_state),
    "update": (UPDATE, decode_update),
}
KINDS = pytest.mark.parametrize("kind", DECODERS)


def same(one: State | Update, other: State | Update) -> bool:
    """Equal to the bit, NaN included."""
    assert (one.topk is None) == (other.topk is None)
    arrays = [(one.dense[name], other.dense[name]) for name in {*one.dense, *other.dense}]
    if one.topk is not None and other.topk is not None:
        arrays += [(one.topk.positions, other.topk.positions), (one.topk.gaps, other.topk.gaps)]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in arrays
    ) and all(
        getattr(one, name, 0) == getattr(other, name, 0) for name in ("version", "reference", "examples")
    )


def sealed(body: bytes) -> bytes:
    """`body` with a checksum that fits: damage that only the decoder itself can see."""
    return body + zlib.crc32(body).to_bytes(4, "little")


# --- Round trips ---------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn) -> AdapterSpec:
    others: list[type[AdapterSpec]] = [LoRASpec, FFALoRASpec, LoRAXSSpec]
    if draw(st.booleans()):
        return draw(st.sampled_from(others))(rank=draw(st.integers(1, 4)))
    if draw(st.booleans()):
        return UniLoRASpec(rank=2, theta_length=draw(st.integers(1, 48)))
    k = draw(st.integers(1, 5))
    return VBLoRASpec(
        rank=2, num_vectors=draw(st.integers(k, 70)), vector_length=draw(st.integers(1, 9)), topk=k
    )


@st.composite
def contents(draw: st.DrawFn) -> tuple[Blueprint, dict[str, np.ndarray], TopK | None]:
    head = BLUEPRINT.head if draw(st.booleans()) else ()
    blueprint = replace(BLUEPRINT, spec=draw(specs()), head=head)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    dense = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in blueprint.dense_shapes.items()
    }
    if blueprint.topk_shape is None:
        return blueprint, dense, None
    rows, k, h = blueprint.topk_shape
    positions = np.argsort(rng.random((rows, h)), axis=1)[:, :k].astype(np.int32)
    return blueprint, dense, TopK(positions, np.sort(rng.random((rows, k - 1)), axis=1).astype(np.float32))


@settings(deadline=None, max_examples=100)
@given(contents(), st.integers(0, (1 << 64) - 1))
def test_a_state_comes_back_to_the_bit(content, version):
    blueprint, dense, topk = content
    state = State(version, dense, topk) if version else initial_state(blueprint)
    back = decode_state(encode_state(state, blueprint), blueprint)
    assert same(back, state)
    assert back.digest == state.digest


@settings(deadline=None, max_examples=100)
@given(
    contents(), st.integers(0, 1 << 40), st.binary(min_size=16, max_size=16), st.integers(0, (1 << 32) - 1)
)
def test_an_update_comes_back_to_the_bit(content, version, reference, examples):
    blueprint, dense, topk = content
    update = Update(version, reference, examples, dense, topk)
    back = decode_update(encode_update(update, blueprint), blueprint)
    assert same(back, update)
    assert all(array.flags.writeable for array in back.dense.values())


def test_numbers_of_an_update_are_not_judged_here():
    update = make_update()
    update.dense["bank"][0] = [np.nan, np.inf, -np.inf, -0.0]
    update.topk.gaps[:2] = [[-np.nan], [-0.0]]
    assert same(decode_update(encode_update(update, BLUEPRINT), BLUEPRINT), update)


@pytest.mark.parametrize("place", [-1, 6, 0])
def test_a_row_that_is_no_selection_cannot_be_written(place):
    update = make_update()
    update.topk.positions[3] = [0, place]
    with pytest.raises(WireError, match="a row names a place twice, or one that is not 0 to 5"):
        encode_update(update, BLUEPRINT)


def test_arrays_may_lie_in_memory_as_they_like():
    state = make_state()
    dense = {name: np.asfortranarray(array) for name, array in reversed(state.dense.items())}
    topk = TopK(np.asfortranarray(state.topk.positions), state.topk.gaps[::-1][::-1])
    assert encode_state(State(5, dense, topk), BLUEPRINT) == STATE


def test_version_0_has_no_sections():
    blob = encode_state(initial_state(BLUEPRINT), BLUEPRINT)
    assert len(blob) == HEADER.size + 4 == 80
    assert section_bytes(blob) == {"frame": 80}


def test_sections_are_as_small_as_their_numbers():
    sizes = section_bytes(UPDATE)
    assert sizes.pop("frame") + sum(sizes.values()) == len(UPDATE)
    assert 0 < sizes.pop("selection") - 4 * BLUEPRINT.rows < 90  # float32 gaps, sets and their frequencies
    assert sizes == {"bank": 2 * 6 * 4, "head": 2 * 10}  # numbers that are bfloat16


@pytest.mark.parametrize("name", GOLDEN_BLOBS)
def test_golden_blobs(name):
    """A change of the format parts new sites from old: raise FORMAT, then run `make_golden`."""
    blob, found = read_golden(name)
    assert read_blob(blob)[0].kind is (Kind.STATE if name.startswith("state") else Kind.UPDATE)
    assert content_digest(found) == json.loads((GOLDEN / "contents.json").read_text())[name]
    blueprint, turn = GOLDEN_BLOBS[name]
    base = None if turn is None else make_reference(blueprint, turn)
    encode = encode_state if isinstance(found, State) else encode_update
    assert encode(found, blueprint, base) == blob, "the same numbers are other bytes now"
    if name in ("state", "update"):
        assert same(found, make_state() if name == "state" else make_update())
    elif name.startswith("state"):
        assert same(found, make_reference(blueprint, 2))
    elif name == "update-lossless":
        assert same(found, make_rounded(blueprint, GOLDEN_WIRES[name]))


def test_every_encoding_has_a_golden_blob():
    sections = [section for name in GOLDEN_BLOBS for section in read_blob(read_golden(name)[0])[1]]
    assert {section.encoding for section in sections} == set(Encoding)
    ways = {section.payload[4] for section in sections if section.encoding is Encoding.STEPS}
    assert ways == {PLAIN, ALONG}
    assert {path.stem for path in GOLDEN.glob("*.hex")} == set(GOLDEN_BLOBS)


# --- Against a base ------------------------------------------------------------------


def trained(reference: State, blueprint: Blueprint, seed: int, scale: float = 0.01) -> Update:
    """An update with a change everywhere, some rows kept, some reweighted, some chosen anew."""
    rng = np.random.default_rng(seed)
    dense = {
        name: rng.normal(0, scale, array.shape).astype(np.float32) for name, array in reference.dense.items()
    }
    topk = reference.topk
    if topk is not None and blueprint.topk_shape is not None:
        rows, k, h = blueprint.topk_shape
        drawn = np.argsort(rng.random((rows, h)), axis=1)[:, :k].astype(np.int32)
        anew, kept = rng.random((2, rows, 1)) < 0.4
        gaps = np.sort(rng.exponential(0.3, topk.gaps.shape), axis=1).astype(np.float32)
        topk = TopK(np.where(anew, drawn, topk.positions), np.where(kept & ~anew, topk.gaps, gaps))
    return Update(reference.version, reference.digest, 10, dense, topk)


def states(blueprint: Blueprint, wire: WireSettings, rounds: int = 3) -> list[State]:
    """Version 0 and the references of a few rounds."""
    held, waiting = [initial(blueprint)], {}
    for number in range(rounds):
        mean = aggregate(held[-1], [trained(held[-1], blueprint, number)], blueprint)
        state, waiting = round_state(mean, held[-1], held[0], wire, waiting)
        held.append(state)
    return held


@settings(deadline=None, max_examples=30)
@given(contents(), st.sampled_from(sorted(WIRES)), st.data())
def test_a_state_comes_back_from_any_base(content, wire, data):
    blueprint = content[0]
    held = states(blueprint, WIRES[wire])
    at = data.draw(st.integers(1, 3))
    base = held[data.draw(st.integers(0, at))]
    blob = encode_state(held[at], blueprint, base)
    assert same(decode_state(blob, blueprint, {base.digest: base}), held[at])
    if base.version:
        with pytest.raises(
            UnknownStateError, match=f"builds on version {base.version} .*, expected one that is held: 0"
        ):
            decode_state(blob, blueprint)
        other = held[0]
        with pytest.raises(UnknownStateError):
            decode_state(blob, blueprint, {other.digest: other})


bits = st.sampled_from([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
gap_bits = st.sampled_from([1.0, 4.0, 6.0, 32.0])


@settings(deadline=None, max_examples=60)
@given(contents(), bits, bits, gap_bits, st.booleans(), st.integers(1, 2))
def test_a_rounded_update_comes_back_to_the_bit(content, up, head, gap, stochastic, version):
    blueprint = content[0]
    reference = states(blueprint, WIRES["default"])[version]
    wire = WireSettings(up, head, gap, feedback=True, stochastic=stochastic)
    exact = trained(reference, blueprint, 9)
    noise = np.random.default_rng(1)
    rounded, left = round_update(exact, reference, wire, {}, noise)
    blob = encode_update(rounded, blueprint, reference)
    back = decode_update(blob, blueprint, reference)
    check_update(back, blueprint, reference)
    assert same(back, rounded)
    assert encode_update(back, blueprint, reference) == blob
    for name, dropped in left.items():
        np.testing.assert_array_equal(exact.dense[name] - back.dense[name], dropped)


@pytest.mark.parametrize(("low", "high"), [(-0.0, 0.5), (-1500.0, 1500.0 - 2.0**-20)])
def test_what_the_grid_cannot_tell_goes_whole(low, high):
    """A base with -0, to which no step leads back, and one that lies 2^31 steps away."""
    blueprint = replace(BLUEPRINT, spec=LoRAXSSpec(rank=2))
    start = initial(blueprint).dense["cores"]
    base = replace(make_reference(blueprint, 1), dense={**make_reference(blueprint, 1).dense})
    base.dense["cores"] = np.full_like(start, low)
    state = replace(base, version=base.version + 1, dense={**base.dense, "cores": np.full_like(start, high)})
    blob = encode_state(state, blueprint, base)
    assert same(decode_state(blob, blueprint, {base.digest: base}), state)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("k", "h"), [(1, 64), (2, 64), (2, 2048), (4, 512)])
def test_reading_many_rows_takes_little_memory(k, h, full):
    """What docs/wire.md says: four times the adapter's state, and 32 bytes a row."""
    blueprint = Blueprint(
        VBLoRASpec(rank=8, num_vectors=h, vector_length=1, topk=k), (Linear("a", 4096, 4096),)
    )
    start, rng, rows = initial(blueprint), np.random.default_rng(0), blueprint.rows
    drawn = np.sort(rng.integers(0, h - k + 1, (rows, k)), axis=1) + np.arange(k)
    codes = np.sort(rng.random((rows, k - 1)) if full else rng.integers(0, 131, (rows, k - 1)), axis=1)
    topk = TopK(drawn.astype(np.int32), codes.astype(np.float32) if full else GAPS[codes])
    update = Update(0, start.digest, 1, {"bank": np.ones((h, 1), np.float32)}, topk)
    blob = encode_update(update, blueprint, start)
    tracemalloc.start()
    found = decode_update(blob, blueprint, start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same(found, update)
    assert peak < 4 * 4 * (h + rows * (2 * k - 1)) + 32 * rows


def test_a_zero_update_is_a_frame():
    reference = states(BLUEPRINT, WIRES["default"])[2]
    zeros = {name: np.zeros_like(array) for name, array in reference.dense.items()}
    update = Update(reference.version, reference.digest, 1, zeros, reference.topk)
    blob = encode_update(update, BLUEPRINT, reference)
    assert section_bytes(blob) == {"frame": HEADER.size + 4}
    assert same(decode_update(blob, BLUEPRINT, reference), update)


def test_a_state_that_did_not_change_is_a_frame():
    reference = states(BLUEPRINT, WIRES["default"])[2]
    blob = encode_state(replace(reference, version=3), BLUEPRINT, reference)
    assert section_bytes(blob) == {"frame": HEADER.size + 4}


def test_an_update_of_another_reference_is_refused():
    first, second = states(BLUEPRINT, WIRES["default"])[1:3]
    blob = encode_update(trained(first, BLUEPRINT, 1), BLUEPRINT, first)
    with pytest.raises(UnknownStateError, match="builds on version 1"):
        decode_update(blob, BLUEPRINT, second)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_compact_blob_that_is_altered_and_sealed_again_raises_nothing_else(data):
    held = states(BLUEPRINT, WIRES["default"])
    first, second = held[1:3]
    rounded, _ = round_update(
        trained(second, BLUEPRINT, 3), second, WIRES["default"], {}, np.random.default_rng(0)
    )
    kind = data.draw(st.sampled_from(["state", "update"]))
    blob = (
        encode_state(second, BLUEPRINT, first)
        if kind == "state"
        else encode_update(rounded, BLUEPRINT, second)
    )
    body = bytearray(blob[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(HEADER.size, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    try:
        if kind == "state":
            assert same(decode_state(sealed(bytes(body)), BLUEPRINT, {first.digest: first}), second)
        else:
            found = decode_update(sealed(bytes(body)), BLUEPRINT, second)
            assert {name: array.shape for name, array in found.dense.items()} == BLUEPRINT.dense_shapes
    except WireError:
        return
