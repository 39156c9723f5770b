"""Updates of any shape from a recorded run, and what they weigh."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.bench.wire import SHAPES, measure, measure_selections, shape_blueprint
from simulations.replay import PHASES, recorded, replayed_update
from vblora.rounding import WIRES
from vblora.spec import Blueprint, Linear, LoRASpec, VBLoRASpec
from vblora.state import check_update

KB = 1000
LIMITS = {  # kB of first uplink, steady uplink, downlink
    "Llama-2-13B": (550, 300, 600),
    "Llama-2-7B": (360, 240, 420),
    "Llama-3.2-3B": (90, 37, 100),
    "RoBERTa-large q,v": (13, 10, 16),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("adapter", [VBLoRASpec(num_vectors=8, vector_length=32), LoRASpec()])
def test_a_replay_is_an_update_of_its_shape(phase, adapter):
    blueprint = Blueprint(adapter, (Linear("a", 96, 64), Linear("b", 64, 40)))
    reference, update = replayed_update(blueprint, phase)
    check_update(update, blueprint, reference)
    again = replayed_update(blueprint, phase)[1]
    assert all(np.array_equal(update.dense[name], again.dense[name]) for name in update.dense)


def test_a_replay_changes_as_many_rows_as_the_run_did():
    blueprint, rows = shape_blueprint("Llama-3.2-3B"), recorded()["steady"]
    reference, update = replayed_update(blueprint, "steady")
    kept = (update.topk.positions == reference.topk.positions).all(axis=1).mean()
    assert kept == pytest.approx((rows.base == rows.chosen).all(axis=1).mean(), abs=0.01)


@pytest.mark.parametrize("name", ["Llama-3.2-3B", "RoBERTa-large q,v"])
def test_messages_of_the_default_wire_are_as_small_as_promised(name):
    found = measure(name, WIRES["default"])
    sizes = [found[phase]["bytes"] / KB for phase in PHASES]
    assert all(size <= limit for size, limit in zip(sizes, LIMITS[name], strict=True)), sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama-2-13B", "Llama-2-7B"])
def test_large_messages_of_the_default_wire_are_as_small_as_promised(name):
    test_messages_of_the_default_wire_are_as_small_as_promised(name)


def test_sets_are_within_three_percent_of_their_limit_in_the_worst_case():
    """Sets drawn evenly: the limit, and a bit for which of the two is the larger."""
    found = measure_selections("Llama-3.2-3B")
    assert found["even"]["ours"] <= 1.03 * (found["limit"] + shape_blueprint("Llama-3.2-3B").rows / 8)


@pytest.mark.parametrize(
    ("name", "rows"), [("Llama-2-13B", 91_680), ("Llama-2-7B", 39_040), ("Llama-3.2-3B", 23_744)]
)
def test_shapes_to_quote(name, rows):
    assert name in SHAPES
    assert shape_blueprint(name).rows == rows
