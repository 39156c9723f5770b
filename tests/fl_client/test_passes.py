"""Gradients of a step: in pieces as of the whole, replayed as passed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_client.batches import IGNORED, Batch, collate
from fl_client.graphs import Graphs
from fl_client.passes import Passes
from fl_client.train import train_cohort
from tests.fl_client.test_train import SETTINGS, TASKS, check_same, make_examples, make_jobs, make_model
from tests.vblora.tiny import LORA, VBLORA, adapt, make_base, make_state
from vblora.state import initial_state

CPU = torch.device("cpu")


def pieces_of(rows: list[list[int]]) -> list[Batch]:
    """Of two clients with nine and six texts; a piece is the rows that each takes."""
    examples = [make_examples(9, 0), make_examples(6, 1)]
    first, second = (np.array(part, np.int64) for part in rows)
    return [collate([(examples[0], first), (examples[1], second)], 0, CPU)]


def gradients(family: str, pieces: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    model = make_model(family)
    tensors = model.load(*[make_state(model.blueprint)] * 2)
    tensors = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    return Passes(model, TASKS[family]).gradients(tensors, tensors, pieces, 2)


@pytest.mark.parametrize("family", TASKS)
def test_pieces_give_the_losses_and_gradients_of_the_whole(family):
    losses, whole = gradients(family, pieces_of([list(range(9)), list(range(6))]))
    cut = [([0, 1, 2, 3], [0]), ([4], [1, 2, 3]), ([5, 6, 7, 8], []), ([], [4, 5])]
    some, found = gradients(family, [batch for rows in cut for batch in pieces_of(list(rows))])
    torch.testing.assert_close(some, losses, rtol=1e-5, atol=1e-6)
    for name, expected in whole.items():
        bound = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(found[name], expected, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("count", [2, 3, 100])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_in_pieces_is_training(family, count):
    model = make_model(family)
    state, jobs = initial_state(model.blueprint), make_jobs()[2:6]
    for together in (jobs, jobs[:1]):
        whole = train_cohort(model, TASKS[family], state, together, SETTINGS)
        cut = train_cohort(model, TASKS[family], state, together, replace(SETTINGS, accumulate=count))
        for one, other in zip(whole, cut, strict=True):
            check_same(one, other, 1e-4)


@pytest.mark.parametrize("family", TASKS)
def test_counts_are_of_what_the_loss_is_the_mean_of(family):
    (batch,) = pieces_of([[0, 1, 2], [3]])
    task = TASKS[family]
    counts = task.counts(batch, 2).tolist()
    if task.labels:
        assert counts == [3, 1]
    else:  # each text's tokens after its prompt; the first is never predicted
        one, other = (
            own.lengths - np.maximum(own.targets, 1) for own in (make_examples(9, 0), make_examples(6, 1))
        )
        assert counts == [np.maximum(one[:3], 0).sum(), max(other[3], 0)]
    nobody = replace(batch, targets=torch.full_like(batch.targets, IGNORED))
    assert task.counts(nobody, 2).tolist() == [0, 0]


@pytest.mark.parametrize(("trained", "spec"), [(["head"], VBLORA), (["bank"], VBLORA), (["rows"], LORA)])
def test_gradients_of_some_tensors_are_those_of_all(trained, spec):
    model = adapt(make_base("bert"), spec)
    tensors = model.load(make_state(model.blueprint))
    passes = Passes(model, TASKS["bert"])
    batch = collate([(make_examples(5, 0), np.arange(5))], 0, CPU)
    some = {name: tensors[name] for name in trained}
    _, found = passes.gradients(tensors, some, [batch], 1)
    _, expected = passes.gradients(tensors, tensors, [batch], 1)
    assert list(found) == trained
    for name in trained:
        assert torch.equal(found[name], expected[name])


# --- Graphs --------------------------------------------------------------------------


def test_lengths_are_few_and_no_longer_than_the_model_reads():
    assert [Graphs().length(tokens) for tokens in (1, 32, 33, 500)] == [32, 32, 64, 512]
    assert [Graphs(510).length(tokens) for tokens in (1, 480, 500, 510)] == [32, 480, 510, 510]


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_replay_gives_what_it_stands_for(family, recompute):
    found = {}
    for graphs in (None, Graphs()):
        model = adapt(make_base(family).cuda(), replace(VBLORA, num_vectors=300))
        for shared in model._inputs:
            shared.recompute = recompute
        state = initial_state(model.blueprint)
        jobs = make_jobs()[2:6]
        for _ in range(2):  # the second time from new tensors
            found[graphs is None] = train_cohort(model, TASKS[family], state, jobs, SETTINGS, graphs=graphs)
    for one, other in zip(found[True], found[False], strict=True):
        check_same(one, other, 1e-3)


@pytest.mark.gpu
def test_a_step_waits_for_nothing_but_the_models_own_look_at_its_mask():
    model = adapt(make_base("bert").cuda())
    tensors = model.load(initial_state(model.blueprint))
    passes = Passes(model, TASKS["bert"])
    batch = collate([(make_examples(5, 0), np.arange(5))], 0, torch.device("cuda"))
    packed = replace(
        batch, mask=torch.ones_like(batch.mask)[:, None, None].bool()
    )  # a mask it takes as it is
    passes.gradients(tensors, tensors, [packed], 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes.gradients(tensors, tensors, [packed], 1)
        model.source.growth()
        model.source.growth()
    finally:
        torch.cuda.set_sync_debug_mode("default")
