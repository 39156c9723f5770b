"""The mean of a round: a pure function of the reference state and the weighted updates.

Sums are exact integers, so the order in which updates arrive does not change one bit of the result. A number
x becomes `round(x * 2^32)` and counts `examples` times:

* A step of 2^-32 = 2.3e-10 is an eighth of float32's spacing at a bank entry of 0.02 (2^-29): what fixed
  point drops of a change, at most half a step, is less than what float32 drops when the change is added.
* The weight of a bank vector in a row, in (0, 1], is held to half a step too. A logit, where those are
  averaged, has coarser steps, 2^-25 where logits start with a standard deviation of 0.1.
* An int64 is good for |x| * examples below 2^31, say a change of 100 over 2^24 examples; an update beyond
  that is refused by itself, whatever came before. Sums that outgrow an int64 go on in a second one.

Axes: S rows, h bank vectors, k mixed vectors a row, n entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from vblora.adapters import VBLoRASpec
from vblora.anchors import anchored
from vblora.errors import UpdateError
from vblora.spec import Blueprint
from vblora.start import LARGEST_LOGIT, order_of
from vblora.state import State, TopK, Update, mixture_weights

__all__ = ["MAX_EXAMPLES", "MAX_TOTAL_EXAMPLES", "Mean", "aggregate"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BITS = 32  # after the binary point
ONE = 1 << BITS
MAX_PEAK = (1 << 63) - ONE - 1  # room for one update on top of what `_FixedSum._carry` leaves behind
MAX_EXAMPLES = 1 << 24  # of one update: so 127 clients that all claim the most still fit into a round
MAX_TOTAL_EXAMPLES = (1 << 31) - 1  # of a round: a weight of 1 from every example still fits an int64
CHUNK = 1 << 18  # numbers converted at once: the temporaries stay in the cache
FLOOR = 2 * LARGEST_LOGIT  # no logit of version 0 lies as far below 0
LARGEST_GAP = 30.0  # between logits that a client says: e^-30 of a mixture is nothing
MOST_SIGMAS = 16.0  # no logit that a seed draws lies as far from 0
MERGE = 1 << 20  # entries of selections that wait before they are merged: 16 MB


def aggregate(
    reference: State, updates: Iterable[Update], blueprint: Blueprint, space: str = "weights"
) -> State:
    """The state after a round: `Mean` over all updates, held one at a time.

    Args:
        reference: the state that every update was trained from.
        updates: each passed by `vblora.state.check_update`.
        blueprint: of the reference.
        space: in which selections are averaged, see `Mean`.

    Returns:
        A state with the next version.

    Raises:
        UpdateError: no updates, or one too large for the sums.
    """
    mean = Mean(reference, blueprint, space)
    for update in updates:
        mean.add(update)
    return mean.finish()


class Mean:
    """A mean of updates, weighted by examples, that takes them one at a time.

    Dense sections: `reference + mean change`, in float32. Top-k rows, by `space`: "weights", the mean of the
    mixture weights over all bank vectors, of which the k largest are kept (ties to the lower position) and
    renormalised; "logits", the mean of the logits that the selections stand for (`candidates.anchored`; a
    logit that a client did not choose has its seed), of which the k largest are kept.

    Memory does not grow with the number of updates: one int64 a dense number (two where sums are huge), and
    some 32 bytes for each (row, bank vector) that any update chose.

    Attributes:
        updates: taken so far.
        examples: that they were trained on, together.
    """

    def __init__(self, reference: State, blueprint: Blueprint, space: str = "weights") -> None:
        self.updates = 0
        self.examples = 0
        self._reference = reference
        self._sums = {name: _FixedSum(array.size) for name, array in reference.dense.items()}
        self._selection = None
        if reference.topk is not None and isinstance(blueprint.spec, VBLoRASpec):
            spec = blueprint.spec
            space_of = _Logits(spec, blueprint) if space == "logits" else _Weights()
            self._selection = _SelectionSum(reference.topk, spec.num_vectors, space_of)

    def add(self, update: Update) -> None:
        """Take one update that passed `check_update`; all of it, or nothing where an error is raised.

        Raises:
            UpdateError: more examples, or a larger change, than the exact sums can hold.
        """
        if not 0 < update.examples <= MAX_EXAMPLES:
            raise UpdateError(
                f"update: examples is {update.examples}, expected 1 to {MAX_EXAMPLES}; take fewer steps"
            )
        if self.examples + update.examples > MAX_TOTAL_EXAMPLES:
            raise UpdateError(
                f"update: its {update.examples} examples make {self.examples + update.examples} this round, "
                f"expected at most {MAX_TOTAL_EXAMPLES}; sample fewer clients"
            )
        peaks = {name: _peak(name, update.dense[name], update.examples) for name in self._sums}
        for name, total in self._sums.items():
            total.add(update.dense[name].reshape(-1), update.examples, peaks[name])
        if self._selection is not None and update.topk is not None:
            self._selection.add(update.topk, update.examples)
        self.updates += 1
        self.examples += update.examples

    def finish(self) -> State:
        """The new state; the accumulator is spent.

        Raises:
            UpdateError: nothing was added.
        """
        if not self.updates:
            raise UpdateError("mean: no update was added, expected at least one")
        dense = {
            name: self._sums[name].added_to(array, self.examples)
            for name, array in self._reference.dense.items()
        }
        topk = self._selection.finish(self.examples) if self._selection is not None else None
        return State(self._reference.version + 1, dense, topk)


def _peak(name: str, change: Floats, times: int) -> int:
    """The largest number that `change` adds to a sum, as an integer of 2^-32 steps."""
    largest = float(np.abs(change).max(initial=0.0))
    peak = (int(largest * ONE) + 1) * times
    if peak > MAX_PEAK:
        raise UpdateError(
            f"update: section {name} changes by up to {largest:.3g} over {times} examples, expected "
            f"change times examples below 2^31; training has diverged, lower the learning rate"
        )
    return peak


class _FixedSum:
    """Exact sums of n fixed-point numbers.

    `_low` alone holds them until it might overflow; then whole multiples of 2^32 move to `_high`. Both stand
    for one integer, whenever that happened, so the order of additions leaves no trace.
    """

    def __init__(self, size: int) -> None:
        self._low: Ints = np.zeros(size, np.int64)
        self._high: Ints | None = None
        self._bound = 0  # no sum in _low is larger than this

    def add(self, change: Floats, times: int, peak: int) -> None:
        """Add `times * change`, whose largest number is at most `peak`. `change` has shape (n,)."""
        if self._bound + peak >= 1 << 63:
            self._carry()
        for part in _chunks(change.size):
            fixed = change[part].astype(np.float64)
            fixed *= ONE
            whole = np.rint(fixed, out=fixed).astype(np.int64)
            whole *= times
            self._low[part] += whole
        self._bound += peak

    def added_to(self, reference: Floats, total: int) -> Floats:
        """`reference + sum / total`, rounded to float32; where the sum is 0, the reference to the bit."""
        old = reference.reshape(-1)
        new = np.empty_like(old)
        for part in _chunks(old.size):
            sums = self._low[part].astype(np.float64)
            if self._high is not None:
                high = (self._high[part] + (self._low[part] >> BITS)).astype(np.float64)
                sums = high * ONE + (self._low[part] & (ONE - 1))
            mean = sums / (float(total) * ONE)
            new[part] = np.where(sums == 0, old[part], (old[part] + mean).astype(np.float32))
        return new.reshape(reference.shape)

    def _carry(self) -> None:
        high = self._low >> BITS
        self._high = high if self._high is None else self._high + high
        self._low &= ONE - 1
        self._bound = ONE


class _Weights:
    """Selections as the weights of their mixtures."""

    def of(self, rows: Ints, topk: TopK) -> Ints:
        """(n, k) positive integers of 2^-32, what `rows` give to each of their positions."""
        # A weight below half a step still counts as one: the ratio of two weights must stay finite.
        return np.maximum(np.rint(mixture_weights(topk.gaps[rows]) * ONE).astype(np.int64), 1)

    def untouched(self, rows: Ints, k: int) -> Ints:
        """(n, m) positions that compete though nobody chose them."""
        return np.empty((len(rows), 0), np.int64)

    def levels(self, rows: Ints, positions: Ints, sums: Ints, total: int) -> Ints:
        """(n,) what the k largest are chosen by; positive."""
        return sums

    def gaps(self, chosen: Ints, total: int) -> Floats:
        """(n, k - 1) gaps of logits, from (n, k) levels."""
        return np.log(chosen[:, :1] / chosen[:, 1:]).astype(np.float32)


class _Logits:
    """Selections as the logits that they stand for, above the seeds that everyone holds.

    A logit can be whatever its client says, unlike a weight. So gaps are cut where more would say nothing,
    and steps are of a size that gives an int64 room for the largest lift from every example of a round.
    """

    def __init__(self, spec: VBLoRASpec, blueprint: Blueprint) -> None:
        self._spec, self._order = spec, order_of(blueprint)
        self._seeds = np.empty((blueprint.rows, 0), np.float32)
        found = self._order.exact  # in a file, with gaps of any size
        spread = 2 * LARGEST_LOGIT if found else 2 * MOST_SIGMAS * spec.init_std
        self._largest_gap = spread if found else LARGEST_GAP
        reach = spread + spec.margin + self._largest_gap
        self._one = 1 << (31 - math.ceil(math.log2(reach)))

    def of(self, rows: Ints, topk: TopK) -> Ints:
        wide = self._seeded(int(topk.positions[rows].max(initial=0)) + 2)
        part = TopK(topk.positions[rows], np.minimum(topk.gaps[rows], np.float32(self._largest_gap)))
        seeds = np.take_along_axis(wide[rows], part.positions.astype(np.int64), axis=1)
        logits = anchored(self._spec, wide[rows], part, keep=self._order.exact)
        lifts = logits.astype(np.float64) - seeds
        return np.rint(lifts * self._one).astype(np.int64)

    def untouched(self, rows: Ints, k: int) -> Ints:
        # Seeds fall along the places: of those that nobody chose only the first can be among the k largest.
        return np.tile(np.arange(min(2 * k, self._spec.num_vectors), dtype=np.int64), (len(rows), 1))

    def levels(self, rows: Ints, positions: Ints, sums: Ints, total: int) -> Ints:
        seeds = self._seeded(int(positions.max(initial=0)) + 1)[rows, positions].astype(np.float64)
        return np.rint(sums / total).astype(np.int64) + np.rint((seeds + FLOOR) * self._one).astype(np.int64)

    def gaps(self, chosen: Ints, total: int) -> Floats:
        return ((chosen[:, :1] - chosen[:, 1:]) / self._one).astype(np.float32)

    def _seeded(self, width: int) -> Floats:
        """(S, W) seeds, W at least `width` (h where that is less)."""
        spec = self._spec
        if self._seeds.shape[1] < min(width, spec.num_vectors):
            wide = min(spec.num_vectors, max(width, 2 * self._seeds.shape[1], spec.topk + 1))
            self._seeds = self._order.logits(np.arange(len(self._seeds)), wide)
        return self._seeds


class _SelectionSum:
    """Exact sums of what updates give to bank vectors, by row and position.

    A row that an update left as the reference has it is only counted. All others become pairs of a key
    (`row * h + position`) and an integer. They are merged, sorted by key, whenever as many wait as are held,
    so each entry is sorted a few times at most.
    """

    def __init__(self, reference: TopK, num_vectors: int, space: _Weights | _Logits) -> None:
        self._reference = reference
        self._space = space
        self._num_vectors = num_vectors
        self._kept: Ints = np.zeros(len(reference.positions), np.int64)  # (S,) examples that left it alone
        self._keys: Ints = np.empty(0, np.int64)  # (n,) rising
        self._sums: Ints = np.empty(0, np.int64)  # (n,)
        self._waiting: list[tuple[Ints, Ints]] = []
        self._waiting_entries = 0

    def add(self, topk: TopK, times: int) -> None:
        """Add one selection that counts `times`."""
        same = topk.same_rows(self._reference)
        self._kept[same] += times
        self._wait(topk, np.flatnonzero(~same), np.int64(times))

    def finish(self, total: int) -> TopK:
        """The k heaviest positions of every row. Rows that all examples left alone stay to the bit."""
        rows = np.flatnonzero(self._kept != total)
        held = rows[self._kept[rows] > 0]
        self._wait(self._reference, held, self._kept[held, None])
        k = self._reference.positions.shape[1]
        first = (rows[:, None] * self._num_vectors + self._space.untouched(rows, k)).ravel()
        self._waiting.append((first, np.zeros_like(first)))
        self._merge()
        positions, gaps = self._reference.positions.copy(), self._reference.gaps.copy()
        if rows.size:
            positions[rows], gaps[rows] = self._heaviest(rows, k, total)
        return TopK(positions, gaps)

    def _wait(self, topk: TopK, rows: Ints, times: Ints | np.int64) -> None:
        sums = self._space.of(rows, topk) * times
        keys = rows[:, None] * self._num_vectors + topk.positions[rows]
        self._waiting.append((keys.ravel(), sums.ravel()))
        self._waiting_entries += keys.size
        if self._waiting_entries >= max(MERGE, self._keys.size):
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._waiting)])
        sums = np.concatenate([self._sums, *(sums for _, sums in self._waiting)])
        self._waiting, self._waiting_entries = [], 0
        if keys.size:
            order = np.argsort(keys, kind="stable")
            keys, sums = keys[order], sums[order]
            starts = _run_starts(keys)
            self._keys, self._sums = keys[starts], np.add.reduceat(sums, starts)

    def _heaviest(self, rows: Ints, k: int, total: int) -> tuple[NDArray[np.int32], Floats]:
        """Positions and gaps of `rows`. Each has k entries at least, as any one selection has.

        k passes, each taking the heaviest of every row: several times faster than sorting the rows by weight.
        """
        of_row, places = np.divmod(self._keys, self._num_vectors)
        starts = _run_starts(of_row)
        lengths = np.diff(np.append(starts, self._keys.size))
        levels = self._space.levels(of_row, places, self._sums, total)
        left = levels.copy()
        best = np.empty((rows.size, k), np.int64)
        for turn in range(k):
            largest = np.repeat(np.maximum.reduceat(left, starts), lengths)
            hits = np.flatnonzero(left == largest)
            best[:, turn] = hits[np.searchsorted(hits, starts)]  # of equals the first, so the lowest position
            left[best[:, turn]] = 0  # every level is positive
        positions = (self._keys[best] - rows[:, None] * self._num_vectors).astype(np.int32)
        gaps = self._space.gaps(levels[best], total)
        return positions, np.maximum.accumulate(gaps, axis=1)  # log need not be monotonic to the last bit


def _run_starts(ordered: Ints) -> Ints:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))
