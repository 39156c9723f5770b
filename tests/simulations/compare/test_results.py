"""From histories to the rows of a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fl_server.plot import read_history
from simulations.compare.results import as_json, compared, mean_curve, result_of, trace
from tests.simulations.compare.made import made_comparison, made_result
from tests.simulations.conftest import read_summary


def test_a_run_from_its_files(finished: Path):
    """What is read agrees with the history, byte for byte."""
    summary, records = read_summary(finished), read_history(finished)
    result = result_of(summary, trace(records), memory=7)
    assert [number for number, _, _ in result.curve] == [0, 1, 2, 3]
    assert [score for _, _, score in result.curve] == [record["score"] for record in records]
    assert result.curve[0][1] == 0
    assert result.curve[-1][1] == result.total
    assert result.total == summary["bytes"]["up_total"] + summary["bytes"]["down_total"]
    assert sum(result.sections.values()) == pytest.approx(summary["bytes"]["up_per_client_round"], abs=1)
    assert (result.memory, result.gpu) == (7, 0)


def test_rows_against_the_baseline():
    comparison = made_comparison()
    assert [row.name for row in comparison.rows] == ["lora:8 float32", "vblora", "lora:8"]
    baseline, vblora, coded = comparison.rows
    assert baseline.difference is None
    assert [result.seed for result in vblora.results] == [0, 1]
    assert vblora.difference is not None
    assert vblora.difference.mean == pytest.approx(-0.02)
    assert (vblora.fewer, coded.fewer) == (100, 10)
    assert vblora.score.mean == pytest.approx(0.78)


def test_bytes_to_shares_of_the_baselines_score_of_the_same_seed():
    baseline, vblora, coded = made_comparison().rows
    assert {share: found.median for share, found in baseline.targets.items()} == {
        0.95: 200_000,
        0.98: 200_000,
        1.0: 200_000,
    }
    assert (vblora.targets[0.95].count, vblora.targets[0.95].median) == (2, 2000)
    assert (vblora.targets[0.98].count, vblora.targets[0.98].median) == (0, None)
    assert (coded.targets[1.0].count, coded.targets[1.0].n) == (1, 2)


def test_of_a_loss_less_is_better():
    groups = {
        "lora": [made_result(seed, [3.0, 2.0, 2.0, 2.0], 1000) for seed in (0, 1)],
        "vblora": [made_result(seed, [3.0, 2.1, 2.03, 2.03], 10) for seed in (0, 1)],
    }
    row = compared(groups, "lora", "loss").rows[1]
    assert row.difference is not None
    assert row.difference.mean > 0
    assert (row.targets[0.95].median, row.targets[0.98].median, row.targets[1.0].median) == (10, 20, None)


def test_without_a_baseline_nothing_is_compared():
    comparison = compared({"vblora": [made_result(0, [0.5, 0.6], 10)]}, "lora:8", "accuracy")
    assert comparison.baseline == ""
    assert comparison.rows[0].difference is None
    assert comparison.rows[0].fewer is None


def test_the_mean_curve_has_the_rounds_of_all_seeds():
    row = compared(
        {"lora": [made_result(0, [0.5, 0.6, 0.7], 10), made_result(1, [0.3, 0.4], 30)]}, "lora", "accuracy"
    ).rows[0]
    assert mean_curve(row) == [(0, 0.0, [0.5, 0.3]), (1, 20.0, [0.6, 0.4])]


def test_the_comparison_as_json():
    content = json.loads(json.dumps(as_json(made_comparison())))
    assert list(content["adapters"]) == ["lora:8 float32", "vblora", "lora:8"]
    vblora = content["adapters"]["vblora"]
    assert vblora["bytes_to_target"]["0.95"] == {"count": 2, "n": 2, "median": 2000, "at_start": 0}
    assert vblora["score"] == {"mean": pytest.approx(0.78), "std": pytest.approx(0), "n": 2}
    assert [run["seed"] for run in vblora["runs"]] == [0, 1]
    assert vblora["sections"] == {"rows": 400, "frame": 100}
