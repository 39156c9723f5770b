"""Updates of any shape from a recorded run, and what they weigh."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from simulations.bench.learning import prepare
from simulations.bench.recorder import record
from simulations.bench.sets import measure_churn, measure_sets
from simulations.bench.wire import SHAPES, TARGETS, measure, run, shape_blueprint
from simulations.replay import PHASES, Rows, recorded, replayed_update, write_message
from tests.simulations.conftest import small_config
from tests.vblora.fuzz import declared
from vblora.rounding import WIRES
from vblora.spec import Blueprint, Linear, LoRASpec, VBLoRASpec
from vblora.state import check_update
from vblora.wire import decode_state, decode_update

KB = 1000


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


@pytest.mark.parametrize("name", TARGETS)
def test_messages_of_the_default_wire_are_as_small_as_promised(name):
    found = measure(name, WIRES["default"])
    sizes = [found[phase]["bytes"] / KB for phase in PHASES]
    assert all(size <= limit for size, limit in zip(sizes, TARGETS[name], strict=True)), sizes
    for phase in ("first", "steady"):
        assert found[phase]["bytes"] <= 1.1 * sum(found[phase]["entropies"].values())


def test_sets_are_within_three_percent_of_their_limit():
    for name in ("Llama-2-13B", "Llama-3.2-3B"):
        for case, sizes in measure_sets(shape_blueprint(name)).items():
            assert sizes["ours"] <= 1.03 * sizes["limit"], (name, case)
            assert sizes["ours"] < min(sizes["packed"], sizes["zlib"], sizes["zstd"] or sizes["zlib"])


def test_a_run_is_recorded(tiny_bert, topics, tmp_path):
    config = small_config(tiny_bert, topics, tmp_path / "run", rounds=6)
    prepare([config], tmp_path)
    record(config, tmp_path, tmp_path / "recorded.npz")
    with np.load(tmp_path / "recorded.npz") as arrays:
        found = {
            phase: Rows(**{name: arrays[f"{phase}_{name}"] for name in Rows.__dataclass_fields__})
            for phase in PHASES
        }
    for rows in found.values():
        assert rows.base.shape == rows.chosen.shape
        assert len(rows.base) == len(rows.gaps) == len(rows.base_gaps) <= 4096
        assert rows.bank.shape[1] == 32
        assert rows.head.shape == (32 * 3 + 3,)
        assert np.isfinite(rows.bank).all()
        assert rows.bank.any()
    assert (found["first"].base == [0, 1]).all(), "from version 0"


def test_the_churn_adds_up():
    for row in measure_churn():
        assert sum(row[name] for name in ("same", "turned", "one new", "two new")) == pytest.approx(1)


@pytest.mark.slow
def test_the_whole_bench(tmp_path, capsys):
    run(tmp_path / "wire.json")
    assert json.loads((tmp_path / "wire.json").read_text()).keys() == {"wires", "sets", "churn"}
    shown = capsys.readouterr().out
    for expected in ("--wire smallest", "Llama-2-13B", "(≤ 550)", "with order", "98.4%"):
        assert expected in shown


@pytest.mark.parametrize(
    ("name", "rows"), [("Llama-2-13B", 91_680), ("Llama-2-7B", 39_040), ("Llama-3.2-3B", 23_744)]
)
def test_shapes_to_quote(name, rows):
    assert name in SHAPES
    assert shape_blueprint(name).rows == rows


@pytest.mark.parametrize("name", ["MiniLM", "Llama-3.2-3B"])
@pytest.mark.parametrize("wire", ["lossless", "default", "smallest", "12 bits"])
def test_reading_takes_four_times_the_memory_of_a_state_at_most(name, wire):
    blueprint = shape_blueprint(name)
    settings = replace(WIRES["default"], up_bits=12.0, down_bits=12.0) if wire == "12 bits" else WIRES[wire]
    for phase in PHASES:
        reference, exact = replayed_update(blueprint, phase)
        blob = write_message(blueprint, phase, reference, exact, settings)
        tracemalloc.start()
        if phase == "down":
            decode_state(blob, blueprint, {reference.digest: reference})
        else:
            decode_update(blob, blueprint, reference)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 4 * declared(blueprint)
