"""Beyond some place every logit is a seeded one: after training, rounding, averaging and anchoring anew.

Over rounds as the server and its clients take them, with rates that drive rows past what is held at first.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fl_client.train import Job, LocalSettings, train_cohort
from fl_server.aggregate import aggregate
from fl_server.broadcast import Broadcast
from tests.fl_client.test_train import TASKS, make_examples
from tests.vblora.dense import largest, seeded_table, unfold
from tests.vblora.tiny import adapt, make_base
from vblora.candidates import Candidates
from vblora.rounding import WIRES, round_update
from vblora.rows import MixedRows
from vblora.spec import VBLoRASpec
from vblora.state import TopK
from vblora.wire import decode_state, decode_update, encode_update, initial

CPU = torch.device("cpu")
SPEC = VBLoRASpec(rank=2, num_vectors=300, vector_length=16, init_std=0.01, seed=5)
SETTINGS = LocalSettings(steps=9, batch_size=4, lr_logits=0.05)


def check_invariant(candidates: Candidates, logits: torch.Tensor, topk: TopK) -> None:
    """Seeded beyond the reach, room for k more, and the k largest of what is held are those of all h."""
    rows, k = len(topk.positions), candidates.spec.topk
    _, seeds = seeded_table(candidates.spec, rows)
    full = unfold(candidates, logits, seeds)
    beyond = torch.arange(seeds.shape[1]) >= candidates.reach.unsqueeze(1)
    assert torch.equal(full[beyond], seeds[beyond])
    widths = candidates._widths()
    assert ((candidates.reach + k <= widths) | (widths == seeds.shape[1])).all()
    found = candidates.select(logits.unsqueeze(0)).places[0]
    assert torch.equal(found, largest(full, k))
    assert (found.numpy() == topk.positions).all(), "the start stands for another selection"


@pytest.mark.parametrize("space", ["weights", "logits"])
@pytest.mark.parametrize("wire", WIRES)
def test_rounds_keep_the_order_that_compacted_logits_rest_on(wire, space):
    model = adapt(make_base("bert", layers=1), SPEC)
    blueprint = model.blueprint
    model.source = MixedRows(blueprint, CPU, width=1)
    broadcast = Broadcast(blueprint, WIRES[wire], initial(blueprint))
    fresh = Candidates(SPEC, blueprint.rows, CPU, width=1)
    moved = 0
    for number in range(4):
        state = decode_state(broadcast.blob("a new client"), blueprint)
        assert state.digest == broadcast.state.digest
        assert state.topk is not None
        check_invariant(fresh, fresh.start(state.topk)[0], state.topk)

        jobs = [Job(str(at), make_examples(12, at), (number, at)) for at in range(3)]
        updates = []
        for trained in train_cohort(model, TASKS["bert"], state, jobs, SETTINGS):
            noise = np.random.default_rng(number)
            rounded, _ = round_update(trained.update, state, WIRES[wire], {}, noise)
            updates.append(decode_update(encode_update(rounded, blueprint, state), blueprint, state))
        moved += int((updates[0].topk.positions != state.topk.positions).any(axis=1).sum())
        broadcast.advance(aggregate(state, updates, blueprint, space))
    assert moved > blueprint.rows / 2, "hardly a row changed: the test shows nothing"
    assert fresh._tiers, "no row outgrew what is held at first"
