"""What the sets of the rows weigh, by coder, and how they change."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.replay import PHASES, recorded, replayed_update
from vblora.selection import encode_selection
from vblora.spec import Blueprint
from vblora.state import TopK
from vblora.wire import initial

__all__ = ["measure_churn", "measure_sets"]


def measure_churn() -> list[dict[str, Any]]:
    """How rows of the recorded run changed: shares by phase."""
    found = []
    for phase in PHASES:
        rows = recorded()[phase]
        kept = (rows.chosen[:, :, None] == rows.base[:, None, :]).any(axis=2).sum(axis=1)
        order = (rows.chosen == rows.base).all(axis=1)
        found.append(
            {
                "phase": phase,
                "same": float(order.mean()),
                "turned": float(((kept == 2) & ~order).mean()),
                "one new": float((kept == 1).mean()),
                "two new": float((kept == 0).mean()),
                "moved": float((rows.gaps != rows.base_gaps).mean()),
            }
        )
    return found


def measure_sets(blueprint: Blueprint) -> dict[str, dict[str, float]]:
    """Bytes of the sets of a first and a steady update and of sets drawn evenly, by coder.

    "limit" is log2 C(h, k) bits a row; "with order" tells too which place of a row is the largest, as
    messages do, "ours" and the others do not.
    """
    assert blueprint.topk_shape is not None
    rows, _, h = blueprint.topk_shape
    limit = rows * math.log2(math.comb(h, blueprint.topk_shape[1])) / 8
    found = {}
    for case, (base, positions) in _cases(blueprint).items():
        packed = _packed(np.sort(positions, axis=1), h)
        found[case] = {
            "limit": limit,
            "packed": len(packed),
            "zlib": len(zlib.compress(packed, 9)),
            "zstd": _zstd(packed),
            "ours": len(encode_selection(_sets_alone(positions, base), base, h)),
            "with order": len(encode_selection(_with_order(positions, base), base, h)),
            "kept": float((np.sort(positions, axis=1) == np.sort(base.positions, axis=1)).all(axis=1).mean()),
        }
    return found


def _cases(blueprint: Blueprint) -> dict[str, tuple[TopK, NDArray[np.int32]]]:
    """What a selection is told against, and its places."""
    cases = {}
    for phase in ("first", "steady"):
        reference, update = replayed_update(blueprint, phase)
        assert reference.topk is not None
        assert update.topk is not None
        cases[phase] = reference.topk, update.topk.positions
    start = initial(blueprint).topk
    assert start is not None
    assert blueprint.topk_shape is not None
    rng, (rows, _, h) = np.random.default_rng(0), blueprint.topk_shape
    first = rng.integers(h, size=rows)
    drawn = np.stack([first, (first + rng.integers(1, h, size=rows)) % h], axis=1)
    return {**cases, "even": (start, drawn.astype(np.int32))}


def _with_order(positions: NDArray[np.int32], base: TopK) -> TopK:
    """Sets and their largest places, without weights: gaps of the base where a row is its, else 0."""
    same = (positions == base.positions).all(axis=1, keepdims=True)
    return TopK(positions, np.where(same, base.gaps, np.float32(0)))


def _sets_alone(positions: NDArray[np.int32], base: TopK) -> TopK:
    """Sets without weights, the member first that is counted first: one of the base's, else the lower."""
    hits = positions[:, :, None] == base.positions[:, None, :]
    rank = np.where(hits.any(axis=2), hits.argmax(axis=2), 2 + positions)
    return _with_order(np.take_along_axis(positions, rank.argsort(axis=1), axis=1), base)


def _packed(positions: NDArray[np.int32], h: int) -> bytes:
    """Every place in as many bits as h takes."""
    bits = max(1, (h - 1).bit_length())
    planes = positions.reshape(-1, 1) >> np.arange(bits) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def _zstd(content: bytes) -> int:
    """Bytes after zstd at its highest level, by pyarrow, which comes with datasets; 0 without it."""
    try:
        import pyarrow
    except ImportError:
        return 0
    return len(pyarrow.Codec("zstd", compression_level=22).compress(content, asbytes=True))
