"""The mean of a round: a pure function of the reference state and the weighted updates.

Sums are exact integers, so the order in which updates arrive does not change one bit of the result. A number
x becomes `round(x * 2^32)` and counts `examples` times:

* A step of 2^-32 = 2.3e-10 is an eighth of float32's spacing at a bank entry of 0.02 (2^-29): what fixed
  point drops of a change, at most half a step, is less than what float32 drops when the change is added.
* The weight of a bank vector in a row, in (0, 1], is held to half a step too.
* An int64 is good for |x| * examples below 2^31, say a change of 100 over 2^24 examples; an update beyond
  that is refused by itself, whatever came before. Sums that outgrow an int64 go on in a second one.

Axes: S rows, h bank vectors, k mixed vectors a row, n entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from vblora.errors import UpdateError
from vblora.spec import Blueprint
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
MERGE = 1 << 20  # entries of selections that wait before they are merged: 16 MB


def aggregate(reference: State, updates: Iterable[Update], blueprint: Blueprint) -> State:
    """The state after a round: `Mean` over all updates, held one at a time.

    Args:
        reference: the state that every update was trained from.
        updates: each passed by `vblora.state.check_update`.
        blueprint: of the reference.

    Returns:
        A state with the next version.

    Raises:
        UpdateError: no updates, or one too large for the sums.
    """
    mean = Mean(reference, blueprint)
    for update in updates:
        mean.add(update)
    return mean.finish()


class Mean:
    """A mean of updates, weighted by examples, that takes them one at a time.

    Dense sections: `reference + mean change`, in float32. Top-k rows: the mean of the mixture weights over
    all bank vectors, of which the k largest are kept (ties to the lower position) and renormalised.

    Memory does not grow with the number of updates: one int64 a dense number (two where sums are huge), and
    some 32 bytes for each (row, bank vector) that any update chose.

    Attributes:
        updates: taken so far.
        examples: that they were trained on, together.
    """

    def __init__(self, reference: State, blueprint: Blueprint) -> None:
        self.updates = 0
        self.examples = 0
        self._reference = reference
        self._sums = {name: _FixedSum(array.size) for name, array in reference.dense.items()}
        self._selection = None
        if reference.topk is not None and blueprint.topk_shape is not None:
            self._selection = _SelectionSum(reference.topk, blueprint.topk_shape[2])

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
            self._low[part] += np.rint(change[part].astype(np.float64) * ONE).astype(np.int64) * times
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


class _SelectionSum:
    """Exact sums of the weights that updates give to bank vectors, by row and position.

    A row that an update left as the reference has it is only counted. All others become pairs of a key
    (`row * h + position`) and a weight. They are merged, sorted by key, whenever as many wait as are held, so
    each entry is sorted a few times at most.
    """

    def __init__(self, reference: TopK, num_vectors: int) -> None:
        self._reference = reference
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
        self._merge()
        positions, gaps = self._reference.positions.copy(), self._reference.gaps.copy()
        if rows.size:
            positions[rows], gaps[rows] = self._heaviest(rows, positions.shape[1])
        return TopK(positions, gaps)

    def _wait(self, topk: TopK, rows: Ints, times: Ints | np.int64) -> None:
        weights = np.rint(mixture_weights(topk.gaps[rows]) * ONE).astype(np.int64)
        # A weight below half a step still counts as one: the ratio of two weights must stay finite.
        sums = np.maximum(weights, 1) * times
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

    def _heaviest(self, rows: Ints, k: int) -> tuple[NDArray[np.int32], Floats]:
        """Positions and gaps of `rows`. Each has k entries at least, as any one selection has.

        k passes, each taking the heaviest of every row: several times faster than sorting the rows by weight.
        """
        starts = _run_starts(self._keys // self._num_vectors)
        lengths = np.diff(np.append(starts, self._keys.size))
        left = self._sums.copy()
        best = np.empty((rows.size, k), np.int64)
        for turn in range(k):
            largest = np.repeat(np.maximum.reduceat(left, starts), lengths)
            hits = np.flatnonzero(left == largest)
            best[:, turn] = hits[np.searchsorted(hits, starts)]  # of equals the first, so the lowest position
            left[best[:, turn]] = 0  # every sum is positive
        positions = (self._keys[best] - rows[:, None] * self._num_vectors).astype(np.int32)
        chosen = self._sums[best]
        gaps = np.log(chosen[:, :1] / chosen[:, 1:]).astype(np.float32)
        return positions, np.maximum.accumulate(gaps, axis=1)  # log need not be monotonic to the last bit


def _run_starts(ordered: Ints) -> Ints:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))
