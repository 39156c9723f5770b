"""Plain texts packed into rows of full length, each still by itself: less padding, and nothing cut off."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fl_client.base import Base
from fl_client.batches import Examples, collate
from vblora.errors import ConfigError

__all__ = ["pack", "require_packable"]

Indices = NDArray[np.int64]

TOLERANCE = (
    0.02  # of the largest logit: 16-bit sums in another order stay below, attention across texts does not
)


def pack(examples: Examples, parts: Sequence[Indices], length: int) -> tuple[Examples, tuple[Indices, ...]]:
    """Pack the texts of each part by themselves, so that no row holds texts of two clients.

    A text longer than a row is cut into pieces, each a text of its own that begins with the last token of the
    one before: nothing tells a text's first token, so every other is predicted once. The longest go first,
    each into the fullest row that still holds it (best fit).

    Args:
        examples: plain texts, whole.
        parts: rows of `examples` by client.
        length: tokens of a row at most, at least 2.

    Returns:
        The packed rows, and which of them are whose.
    """
    pieces: list[tuple[int, int]] = []  # (start, stop) in the tokens
    ends: list[int] = []  # of each row, in pieces
    counts = []
    for part in parts:
        rows = _best_fit(list(_pieces(examples, part, length)), length)
        counts.append(len(rows))
        for row in rows:
            pieces += row
            ends.append(len(pieces))
    starts, stops = np.array(pieces, np.int64).reshape(-1, 2).T
    lengths = stops - starts
    ahead = np.concatenate([[0], np.cumsum(lengths)])
    places = np.arange(ahead[-1]) + np.repeat(starts - ahead[:-1], lengths)
    begins = np.zeros(len(places), np.bool_)
    begins[ahead[:-1]] = True
    bounds = ahead[np.concatenate([[0], np.array(ends, np.int64)])].astype(np.int64)
    leading = examples.targets[:1].repeat(len(ends))  # the same for all plain texts
    edges = np.cumsum([0, *counts])
    owned = tuple(np.arange(low, high) for low, high in pairwise(edges.tolist()))
    return Examples(examples.tokens[places], bounds, leading, begins), owned


def require_packable(base: Base) -> None:
    """See that a model keeps the texts of a packed row apart, by trying.

    Raises:
        ConfigError: it does not.
    """
    model = base.model
    device = next(model.parameters()).device
    tokens = np.arange(10, dtype=np.int32) % 7 + 3
    texts = Examples(tokens, np.array([0, 4, 10]), np.ones(2, np.int64))
    row, parts = pack(texts, [np.arange(2)], 10)
    alone = collate([(texts, np.array([0]))], base.pad, device)
    together = collate([(row, parts[0])], base.pad, device)
    cached, model.config.use_cache = model.config.use_cache, False  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            expected = model(**alone.inputs).logits[0].float()
            found = model(**together.inputs).logits[0, 6:].float()
    except TypeError as error:
        raise ConfigError(f"--pack: this model takes no position_ids ({error}); use --no-pack") from error
    finally:
        model.config.use_cache = cached  # type: ignore[union-attr]
    if (found - expected).abs().max() > TOLERANCE * expected.abs().max():
        raise ConfigError("--pack: this model mixes the texts of a packed row; use --no-pack")


def _pieces(examples: Examples, part: Indices, length: int) -> Iterable[tuple[int, int]]:
    for row in part.tolist():
        first, stop = int(examples.starts[row]), int(examples.starts[row + 1])
        for start in range(first, min(stop, max(first + 1, stop - 1)), length - 1):
            yield start, min(start + length, stop)


def _best_fit(pieces: list[tuple[int, int]], length: int) -> list[list[tuple[int, int]]]:
    """Rows of pieces that together have `length` tokens at most."""
    rows: list[list[tuple[int, int]]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), rising
    for start, stop in sorted(pieces, key=lambda piece: piece[0] - piece[1]):
        at = bisect_left(room, (stop - start, -1))
        if at == len(room):
            left, row = length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append((start, stop))
        insort(room, (left - (stop - start), row))
    return rows
