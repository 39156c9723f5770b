"""What a study says against LoRA r8."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fl_client.train import RATES, LocalSettings
from simulations.bench import learning
from simulations.bench.rivals import comparisons, tables
from simulations.compare.protocol import GRID
from simulations.config import check_config, default_config
from tests.conftest import ROOT

STUDIES = ROOT / "simulations" / "bench" / "studies"


def result(seed: int, scores: list[float], round_bytes: int, **config: Any) -> dict[str, Any]:
    """As `learning.run_one` gives it; keys are named with underscores."""
    last = scores[-3:]
    keys = {name.replace("_", "-"): value for name, value in config.items()}
    return {
        "config": {"seed": seed, "rounds": len(scores) - 1, **keys},
        "seed": seed,
        "score": {
            "metric": "accuracy",
            "start": scores[0],
            "final": scores[-1],
            "best": max(scores),
            "last3": sum(last) / len(last),
        },
        "bytes": {
            "up_per_client_round": round_bytes // 2,
            "down_per_client_round": round_bytes // 2,
            "up_total": round_bytes * (len(scores) - 1) // 2,
            "down_total": round_bytes * (len(scores) - 1) // 2,
        },
        "parameters": {"trained": 10, "sent": 5},
        "seconds": 1.0,
        "curve": [[number, number * round_bytes, score] for number, score in enumerate(scores)],
        "sections": {"rows": round_bytes / 2},
    }


def study() -> list[dict[str, Any]]:
    """Two deals, four methods each, two seeds."""
    rise = [0.5, 0.8, 0.8, 0.8]
    found = []
    for partition in ("iid", "dirichlet:0.1"):
        for seed in (0, 1):
            deal = {"partition": partition}
            found += [
                result(seed, rise, 1000, adapter="lora", rank=8, wire="lossless", **deal),
                result(seed, rise, 100, adapter="lora", rank=8, **deal),
                result(
                    seed,
                    [x - 0.01 for x in rise],
                    10,
                    adapter="vblora",
                    num_vectors=256,
                    lr_bank=0.01,
                    **deal,
                ),
                result(
                    seed, [x - 0.1 for x in rise], 10, adapter="vblora", num_vectors=256, lr_bank=0.1, **deal
                ),
            ]
    return found


def test_methods_are_compared_within_a_protocol():
    found = comparisons(study())
    assert [heading for heading, _ in found] == ["partition iid", "partition dirichlet:0.1"]
    for _, comparison in found:
        assert comparison.baseline == "lora:8 float32"
        assert [row.name for row in comparison.rows] == [
            *("lora:8 float32", "lora:8", "vblora:256 lr-bank=0.01", "vblora:256 lr-bank=0.1")
        ]
        good, bad = comparison.rows[2:]
        assert good.difference is not None
        assert good.difference.mean == pytest.approx(-0.01)
        assert (good.fewer, good.targets[0.98].median, bad.targets[0.95].count) == (100, 10, 0)


def test_numbers_that_found_rates_of_their_own_keep_their_names():
    """Else LoRA through the codec would not be known as the baseline's."""
    kinds = [
        {"rank": 8, "wire": "lossless", "lr_rows": 1.0},
        {"rank": 8, "lr_rows": 1.0},
        {"rank": 32, "lr_rows": 2.0},
    ]
    found = [result(0, [0.5, 0.8], 1000, adapter="lora", **keys) for keys in kinds]
    ((_, comparison),) = comparisons(found)
    assert [row.name for row in comparison.rows] == ["lora:8 float32", "lora:8", "lora:32"]
    assert "| fewer than lora:8 float32 | fewer than lora:8 |" in tables(found)


def test_a_default_is_the_same_said_or_not():
    found = [
        result(0, [0.5, 0.8], 10, adapter="vblora", num_vectors=32, lr_bank=LocalSettings.lr_bank),
        result(1, [0.5, 0.6], 10, num_vectors=32.0),
    ]
    ((_, comparison),) = comparisons(found)
    assert [(row.name, len(row.results)) for row in comparison.rows] == [("vblora:32", 2)]


def test_the_best_lora_is_the_baseline():
    found = [
        result(0, [0.5, 0.7], 10, adapter="lora", rank=8, lr_rows=1.0),
        result(0, [0.5, 0.9], 10, adapter="lora", rank=8, lr_rows=2.0),
        result(0, [0.5, 0.99], 10, adapter="lora", rank=32),
    ]
    ((heading, comparison),) = comparisons(found)
    assert heading == ""
    assert comparison.baseline == "lora:8 lr-rows=2.0"
    assert comparisons(found[2:])[0][1].baseline == ""
    assert comparisons([]) == []


def test_results_without_evaluations_have_scores_at_least():
    """As studies left them before curves were kept."""
    found = [
        {key: value for key, value in one.items() if key not in ("curve", "sections")} for one in study()[:8]
    ]
    shown = tables(found)
    assert "| vblora:256 lr-bank=0.01 | 0.7900 ± 0.0000 |" in shown
    assert "not reached" in shown


def test_own_scores_and_scores_of_answers_have_columns():
    found = study()[:8]
    assert "BLEU" not in tables(found)
    assert "own, last three" not in tables(found)
    for at, one in enumerate(found[:2]):
        one["score"] |= {"own_last3": 0.9, "own_std": 0.1, "texts": {"bleu": 12.5 + at, "rouge_l": 0.25}}
    shown = tables(found)
    assert "| own, last three | spread among clients | BLEU | ROUGE-L | seconds |" in shown
    assert "| 0.9000 | 0.1000 | 13.5000 | 0.2500 | 1 |" in shown


def test_tables_of_what_a_study_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.json").write_text(json.dumps([*study()[:8], {"config": {}, "error": "out of memory"}]))
    (tmp_path / "b.json").write_text(json.dumps(study()[8:]))
    typed = [part for name in ("a", "b") for part in ("--table", str(tmp_path / f"{name}.json"))]
    learning.main([*typed, "--plot", str(tmp_path / "scores.png")])
    shown = capsys.readouterr().out
    assert shown == tables(study()) + "\n"
    assert "| vblora:256 lr-bank=0.01 | 0.7900 ± 0.0000 |" in shown
    assert "10 local steps of 16 texts, iid; 2 seeds.\n\n| adapter |" in shown
    for name in ("scores.png", "scores-1.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        learning.main([])


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_studies_hold_configs(path: Path):
    """Every run passes the check that a run starts with."""
    configs = learning.read_study(path)
    for config in configs:
        check_config({**default_config(), **config})
    assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs)


COMPARED = {  # studies, and those of their rates
    "compare-sst2": ("rates-sst2", "settings-rank16"),
    "compare-sst2-skew": ("rates-sst2-skew",),
    **{
        f"compare-{name}": (f"rates-{name}", "settings-rank8", "settings-server", "settings-rank16")
        for name in ("banking77", "docstrings")
    },
    **{name: (f"rates-{name}",) for name in ("t0", "e2e")},
}
TRAINING_ROWS = ("runs/data/e2e-names", "runs/data/sst2-sentences")  # parted by bench.prepare


def tried(studies: Sequence[str]) -> list[dict[str, Any]]:
    """All runs of studies of rates, which none is without being scored on training texts."""
    configs = [config for name in studies for config in learning.read_study(STUDIES / f"{name}.json")]
    assert all(config.get("eval-split") == "train" or config["data"] in TRAINING_ROWS for config in configs)
    return configs


def test_the_docs_name_studies_that_there_are():
    named = {
        name
        for path in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"(?:studies|\$S)/([\w-]+\.json)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert named <= {path.name for path in STUDIES.iterdir()}


def test_rates_are_not_chosen_on_what_is_compared():
    for compared, rates in COMPARED.items():
        final = learning.read_study(STUDIES / f"{compared}.json")
        assert not {config["seed"] for config in tried(rates)} & {config["seed"] for config in final}


def test_the_rates_that_are_tried_are_those_of_a_comparison():
    """Half, once and twice what a run has by default."""
    for rates in ("rates-sst2", "rates-banking77", "rates-docstrings"):
        values: dict[str, set[float]] = {}
        for config in tried([rates]):
            rate = next(key for key in ("lr-rows", "lr-bank") if key in config)
            values.setdefault(str(config["adapter"]), set()).add(config[rate])
        for kind, found in values.items():
            default = RATES.get(kind, LocalSettings.lr_bank)
            assert found >= {default * factor for factor in GRID}
