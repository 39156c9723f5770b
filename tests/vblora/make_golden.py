"""Make tests/vblora/golden: `python -m tests.vblora.make_golden`.

Run it only when a number or the format is changed on purpose: sites with the old cannot talk to the new.

seeded.json   the first draws of every stream, and digests of many more
state.hex     a blob of a reference state
update.hex    a blob of an update against it
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from vblora import seeded
from vblora.rounding import from_grid
from vblora.selection import GAP_STEP
from vblora.spec import Blueprint, HeadTensor, Linear, VBLoRASpec
from vblora.state import State, TopK, Update
from vblora.wire import encode_state, encode_update, initial

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


def make_compact() -> tuple[State, State, Update]:
    """A state on the grid, the next one, and an update from that on whole steps."""
    start = initial(BLUEPRINT)
    rows = np.arange(BLUEPRINT.rows)
    assert start.topk is not None
    found = []
    for turn in (1, 2):
        steps = {
            name: (np.arange(array.size) * 37 % (40 * turn) - 9).reshape(array.shape) * 2048
            for name, array in start.dense.items()
        }
        dense = {name: from_grid(array, steps[name]) for name, array in start.dense.items()}
        moved = (rows % 3 < turn)[:, None]
        positions = np.where(
            moved, np.stack([(rows + turn) % 6, (rows + turn + 2) % 6], 1), start.topk.positions
        )
        gaps = np.where(moved, (rows % 50)[:, None] * GAP_STEP, start.topk.gaps)
        found.append(State(turn, dense, TopK(positions.astype(np.int32), gaps.astype(np.float32))))
    step = 2.0**-9
    whole = {name: np.rint(array * 700).astype(np.float32) for name, array in make_state().dense.items()}
    update = Update(
        2,
        found[1].digest,
        77,
        {name: array * np.float32(step) for name, array in whole.items()},
        found[0].topk,
        dict.fromkeys(whole, step),
    )
    return found[0], found[1], update


def make_blobs() -> dict[str, bytes]:
    """One blob of each kind."""
    first, second, update = make_compact()
    return {
        "state": encode_state(make_state(), BLUEPRINT),
        "update": encode_update(make_update(), BLUEPRINT),
        "state-change": encode_state(second, BLUEPRINT, first),
        "update-rounded": encode_update(update, BLUEPRINT, second),
    }


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "seeded.json").write_text(json.dumps(draws(), indent=1) + "\n")
    for name, blob in make_blobs().items():
        (GOLDEN / f"{name}.hex").write_text("\n".join(textwrap.wrap(blob.hex(), 96)) + "\n")


if __name__ == "__main__":
    main()
