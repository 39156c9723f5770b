"""Settings held against one another, seed by seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from simulations.bench.learning import read_study
from simulations.bench.pairs import main, pair, read_results
from vblora.errors import RunError

STUDIES = Path(__file__).parents[2] / "simulations" / "bench" / "studies"


def result(seed: int, last3: float, up: int, **config: Any) -> dict[str, Any]:
    given = {"rounds": 30, "seed": seed, **{name.replace("_", "-"): value for name, value in config.items()}}
    return {"config": given, "score": {"last3": last3, "best": last3}, "bytes": {"up_per_client_round": up}}


RESULTS = [
    *(result(seed, 0.80 + seed / 100, 140_000, wire_up_bits=32) for seed in range(3)),
    *(result(seed, 0.79 + seed / 100 + seed / 1000, 13_000, wire_up_bits=3) for seed in range(4)),
    *(result(seed, 0.81, 13_100, wire_up_bits=3, wire_feedback="on") for seed in range(1)),
    {"config": {"seed": 9}, "error": "out of memory"},
]


def test_differences_of_the_same_seeds(tmp_path: Path):
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    found = pair(read_results([tmp_path / "r.json"]), {"wire-up-bits": "32"})
    assert [str(item) for item in found] == [
        "wire-up-bits=32",
        "wire-up-bits=3",
        "wire-feedback=on wire-up-bits=3",
    ]
    assert found[0].difference.mean == found[0].half == 0
    assert found[1].difference.mean == pytest.approx(-0.009)
    assert found[1].half == pytest.approx(4.303 * 0.001 / math.sqrt(3), rel=1e-3)
    assert found[2].half is None


def test_the_setting_must_be_one():
    for wanted in ({"wire-up-bits": "3"}, {"wire-up-bits": "5"}):
        with pytest.raises(RunError, match=r"settings have .*, expected one of 3"):
            pair(RESULTS[:-1], wanted)


def test_table_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = [result(seed, 0.8, 13_100, wire_up_bits=3, wire_feedback="on") for seed in range(3)]
    (tmp_path / "r.json").write_text(json.dumps([*RESULTS, *more]))
    main([str(tmp_path / "r.json"), "--against", "wire-up-bits=32", "--plot", str(tmp_path / "curve.png")])
    shown = capsys.readouterr().out
    assert "-0.90" in shown
    assert imread(tmp_path / "curve.png").shape[0] > 200


@pytest.mark.parametrize(("name", "runs"), [("sst2", 15 + 36), ("banking77", 15 + 27)])
def test_the_studies_of_the_wire_leave_rates_alone(name: str, runs: int):
    configs = [
        config for kind in ("wire", "wire-bits") for config in read_study(STUDIES / f"{kind}-{name}.json")
    ]
    assert len(configs) == runs
    base = json.loads((STUDIES / f"{name}.json").read_text())["base"]
    for config in configs:
        assert base.items() <= config.items()
        assert not any(key.startswith("lr-") for key in config)
