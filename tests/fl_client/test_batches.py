"""Which examples a step trains on, and how they are padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.batches import IGNORED, Examples, by_length, collate, plan_round, shard

CPU = torch.device("cpu")


def make_examples(lengths: list[int], seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, 100, starts[-1]).astype(np.int32)
    return Examples(tokens, starts, rng.integers(0, 5, len(lengths)))


EXAMPLES = st.lists(st.integers(0, 9), min_size=1, max_size=30).map(make_examples)


# --- Examples ------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(EXAMPLES, st.data())
def test_taken_examples_are_those_examples(examples, data):
    indices = np.array(data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=10)), np.int64)
    taken = examples.take(indices)
    assert len(taken) == len(indices)
    assert taken.tokens.dtype == np.int32
    for place, index in enumerate(indices):
        assert taken.text(place).tolist() == examples.text(index).tolist()
        assert taken.targets[place] == examples.targets[index]
    assert taken.lengths.tolist() == examples.lengths[indices].tolist()


# --- The plan of a round -------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(EXAMPLES, st.integers(1, 12), st.integers(1, 8), st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_a_plan_uses_every_example_once_before_any_twice(examples, steps, batch_size, seed):
    plan = plan_round(examples, steps, batch_size, seed)
    size = min(batch_size, len(examples))
    assert [len(batch) for batch in plan] == [size] * steps
    drawn = np.concatenate(plan)
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn, minlength=len(examples))
    assert len(counts) == len(examples)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(examples.lengths[drawn]) <= 0).all(), "longest first"
    again = plan_round(examples, steps, batch_size, seed)
    assert all((one == other).all() for one, other in zip(plan, again, strict=True))


def test_plans_depend_on_every_part_of_the_seed():
    examples = make_examples([4] * 50)
    plans = {
        tuple(np.concatenate(plan_round(examples, 3, 8, seed)))
        for seed in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0)]
    }
    assert len(plans) >= 4  # numpy draws (0, 0) and (0, 0, 0) alike
    assert len({plan for plan in plans if len(plan) == 24}) == len(plans)


def test_draws_are_fair():
    examples = make_examples([3] * 10)
    counts = np.zeros(10)
    for number in range(1000):
        counts += np.bincount(np.concatenate(plan_round(examples, 1, 3, (7, number))), minlength=10)
    assert (abs(counts - 300) < 5 * np.sqrt(300 * 0.7)).all()


# --- Shards --------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 100), st.integers(1, 12))
def test_shards_are_contiguous_parts_of_all_rows(count, shards):
    parts = [shard(count, index, shards) for index in range(shards)]
    assert np.concatenate(parts).tolist() == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


# --- Padding -------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.lists(EXAMPLES, min_size=1, max_size=4), st.data())
def test_a_batch_holds_each_clients_rows_in_its_own_place(clients, data):
    parts = [
        (examples, np.array(data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=4)), np.int64))
        for examples in clients
    ]
    rows = max(len(indices) for _, indices in parts)
    batch = collate(parts, 77, CPU)
    assert batch.tokens.shape == batch.mask.shape
    assert len(batch.tokens) == len(batch.targets) == rows * len(parts)
    assert {batch.tokens.dtype, batch.mask.dtype, batch.targets.dtype} == {torch.int64}
    longest = max((len(ex.text(i)) for ex, indices in parts for i in indices), default=0)
    assert batch.tokens.shape[1] == max(1, longest)
    for client, (examples, indices) in enumerate(parts):
        for row in range(rows):
            tokens, mask, target = (
                tensor[client * rows + row].tolist() for tensor in (batch.tokens, batch.mask, batch.targets)
            )
            text = examples.text(indices[row]).tolist() if row < len(indices) else []
            assert tokens == text + [77] * (len(tokens) - len(text))
            assert mask == [1] * max(1, len(text)) + [0] * (len(mask) - max(1, len(text)))
            assert target == (examples.targets[indices[row]] if row < len(indices) else IGNORED)


def test_a_batch_without_any_row_is_empty():
    batch = collate([(make_examples([3]), np.empty(0, np.int64))], 0, CPU)
    assert batch.tokens.shape == (0, 1)


@pytest.mark.gpu
def test_a_batch_goes_to_the_device():
    batch = collate([(make_examples([3, 2]), np.arange(2))], 0, torch.device("cuda"))
    assert batch.tokens.is_cuda
    assert batch.mask.is_cuda
    assert batch.targets.is_cuda


@settings(deadline=None, max_examples=100)
@given(EXAMPLES, st.integers(1, 60))
def test_evaluation_batches_hold_every_example_once(examples: Examples, tokens: int) -> None:
    batches = by_length(examples, tokens)
    assert sorted(int(row) for batch in batches for row in batch) == list(range(len(examples)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * int(examples.lengths[batch].max()) <= tokens
