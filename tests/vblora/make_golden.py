"""Make tests/vblora/golden: `python -m tests.vblora.make_golden`.

Run it only when a number or the format is changed on purpose: sites with the old cannot talk to the new.

seeded.json     the first draws of every stream, and digests of many more
NAME.hex        a blob of each kind
contents.json   digests of what the blobs hold
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vblora import seeded
from vblora.gaps import GAPS
from vblora.rounding import WIRES, WireSettings, from_grid, round_update
from vblora.spec import Blueprint, HeadTensor, Linear, LoRASpec, VBLoRASpec
from vblora.state import State, TopK, Update
from vblora.wire import decode_state, decode_update, encode_state, encode_update, initial

GOLDEN = Path(__file__).with_name("golden")

SPEC = VBLoRASpec(rank=2, num_vectors=6, vector_length=4, topk=2, seed=11)
HEAD = (HeadTensor("classifier.weight", (2, 4)), HeadTensor("classifier.bias", (2,)))
BLUEPRINT = Blueprint(SPEC, (Linear("layer.0", 4, 8), Linear("layer.1", 8, 4)), HEAD, "toy-4", ("a", "b"))


def draws() -> dict[str, Any]:
    """Numbers as they are (a float32 is exact as a float) and digests of little-endian arrays."""
    rows = np.array([0, 1, 91_679], np.int64)
    many = np.arange(64)
    return {
        "uniform": {
            stream: seeded.uniform(3, stream, 5, 4, 0.02).astype(float).tolist()
            for stream in ("bank", "head", "rows")
        },
        "order": {
            str(h): seeded.order(3, rows, h, min(h, 8)).tolist()
            for h in (1, 2, 3, 10, 90, 256, 2048, 1 << 20)
        },
        "values": {
            str(h): seeded.values(3, rows, h, min(h, 5), 0.1).astype(float).tolist()
            for h in (1, 2, 3, 10, 90, 256, 2048, 1 << 20)
        },
        "large seed": seeded.order((1 << 62) - 1, rows, 2048, 8).tolist(),
        "sha256": {
            "uniform": sha256(seeded.uniform(0, "bank", 0, 1 << 16, 0.02)),
            "order 2048": sha256(seeded.order(0, many, 2048, 2048)),
            "order 90": sha256(seeded.order(0, many, 90, 90)),
            "values 2048": sha256(seeded.values(0, many, 2048, 2048, 0.1)),
            "values 90": sha256(seeded.values(0, many, 90, 90, 0.01)),
        },
    }


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def make_state() -> State:
    """Numbers that are exact in float32 and come from no generator."""
    topk = TopK(
        np.array([[row % 6, (row + 1 + row % 4) % 6] for row in range(BLUEPRINT.rows)], np.int32),
        np.arange(BLUEPRINT.rows, dtype=np.float32)[:, None] / 8,
    )
    dense = {
        name: (np.arange(np.prod(shape), dtype=np.float32) - 7).reshape(shape) / 64
        for name, shape in BLUEPRINT.dense_shapes.items()
    }
    return State(5, dense, topk)


def make_update() -> Update:
    state = make_state()
    assert state.topk is not None
    topk = TopK(state.topk.positions[::-1].copy(), state.topk.gaps / 2)
    return Update(5, state.digest, 321, {name: -array / 2 for name, array in state.dense.items()}, topk)


@lru_cache(maxsize=32)
def make_reference(blueprint: Blueprint, turn: int) -> State:
    """A state on the grid, as after `turn` rounds; it comes from no generator."""
    start = initial(blueprint)
    dense = {
        name: from_grid(array, (np.arange(array.size) * 37 % (40 * turn) - 9).reshape(array.shape) * 2048)
        for name, array in start.dense.items()
    }
    return State(turn, dense, _chosen(start.topk, blueprint, turn))


def make_rounded(blueprint: Blueprint, wire: WireSettings) -> Update:
    """An update from the second of these states, rounded as a wire has it. Large numbers are among it."""
    reference = make_reference(blueprint, 2)
    dense = {}
    for name, array in reference.dense.items():
        numbers = np.arange(array.size, dtype=np.float32)
        change = (numbers * 29 % 31 - 15) / 1024 * (1 + numbers // array.shape[-1])
        change[array.size // 2] = 3.5
        dense[name] = change.reshape(array.shape)
    topk = _chosen(reference.topk, blueprint, 3)
    update = Update(2, reference.digest, 77, dense, topk)
    return round_update(update, reference, wire, {}, np.random.default_rng(0))[0]


def _chosen(topk: TopK | None, blueprint: Blueprint, turn: int) -> TopK | None:
    """Some rows kept, some weighed anew, some turned round, some chosen anew."""
    if topk is None or blueprint.topk_shape is None:
        return None
    rows, k, h = blueprint.topk_shape
    fates = (np.arange(rows) * turn % 5)[:, None]
    anew = (np.arange(rows)[:, None] * turn + np.arange(k) * turn) % min(h, 7)  # the first are frequent
    positions = np.where(fates == 1, topk.positions[:, ::-1], np.where(fates == 2, anew, topk.positions))
    gaps = GAPS[4 * (np.arange(rows)[:, None] * turn % 30 + np.arange(k - 1))]
    return TopK(positions.astype(np.int32), np.where(fates == 3, topk.gaps, gaps))


HEADLESS = Blueprint(SPEC, BLUEPRINT.linears, (), "toy-4")
THREE = Blueprint(VBLoRASpec(rank=2, num_vectors=11, vector_length=4, topk=3, seed=11), BLUEPRINT.linears)
LARGE = Blueprint(VBLoRASpec(rank=4, num_vectors=64, vector_length=16, seed=11), (Linear("a", 1024, 1024),))
MANY = Blueprint(VBLoRASpec(rank=1, num_vectors=64, vector_length=128, seed=11), (Linear("a", 128, 128),))
LORA = Blueprint(LoRASpec(rank=2, seed=11), BLUEPRINT.linears, HEAD, "toy-4", ("a", "b"))

# Of each blob: its adapter, and what it builds on, a number of `make_reference`'s turns; None is whole.
GOLDEN_BLOBS: dict[str, tuple[Blueprint, int | None]] = {
    "state": (BLUEPRINT, None),
    "state-change": (BLUEPRINT, 1),
    "state-change-lora": (LORA, 1),
    "update": (BLUEPRINT, None),
    "update-lossless": (BLUEPRINT, 2),
    "update-default": (BLUEPRINT, 2),
    "update-smallest": (BLUEPRINT, 2),
    "update-plain": (BLUEPRINT, 2),
    "update-bfloat16": (BLUEPRINT, 2),
    "update-headless": (HEADLESS, 2),
    "update-three": (THREE, 2),
    "update-large": (LARGE, 2),
    "update-trellis": (LARGE, 2),
    "update-blocks": (MANY, 2),
    "update-lora": (LORA, 2),
}
GOLDEN_WIRES = {
    "update-lossless": WIRES["lossless"],
    "update-smallest": WIRES["smallest"],
    "update-plain": replace(WIRES["default"], stochastic=True),
    "update-bfloat16": replace(WIRES["default"], up_bits=16.0),
    "update-trellis": replace(WIRES["default"], trellis=True),
    "update-blocks": replace(WIRES["default"], up_bits=0.75),
}


def make_blob(name: str) -> bytes:
    """One of `GOLDEN_BLOBS`, as it is written now."""
    blueprint, turn = GOLDEN_BLOBS[name]
    if turn is None:
        whole = {
            "state": encode_state(make_state(), blueprint),
            "update": encode_update(make_update(), blueprint),
        }
        return whole[name]
    base = make_reference(blueprint, turn)
    if name.startswith("state"):
        return encode_state(make_reference(blueprint, 2), blueprint, base)
    wire = GOLDEN_WIRES.get(name, WIRES["default"])
    return encode_update(make_rounded(blueprint, wire), blueprint, base)


def read_golden(name: str) -> tuple[bytes, State | Update]:
    """A committed blob, and what is read from it."""
    blob = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    return blob, read_as(name, blob)


def read_as(name: str, blob: bytes) -> State | Update:
    """What is read from a blob of this kind."""
    blueprint, turn = GOLDEN_BLOBS[name]
    base = None if turn is None else make_reference(blueprint, turn)
    if name.startswith("state"):
        return decode_state(blob, blueprint, {} if base is None else {base.digest: base})
    return decode_update(blob, blueprint, base)


def content_digest(found: State | Update) -> str:
    """SHA-256 of all numbers of a state or an update, in a fixed order."""
    arrays = [found.dense[name] for name in sorted(found.dense)]
    if found.topk is not None:
        arrays += [found.topk.positions, found.topk.gaps]
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "seeded.json").write_text(json.dumps(draws(), indent=1) + "\n")
    contents = {}
    for name in GOLDEN_BLOBS:
        blob = make_blob(name)
        (GOLDEN / f"{name}.hex").write_text("\n".join(textwrap.wrap(blob.hex(), 96)) + "\n")
        contents[name] = content_digest(read_as(name, blob))
    (GOLDEN / "contents.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
