"""Settings held against one another, seed by seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from simulations.bench.learning import read_study
from simulations.bench.origin import read_results
from simulations.bench.pairs import main, pair
from vblora.errors import RunError

STUDIES = Path(__file__).parents[2] / "simulations" / "bench" / "studies"


def result(seed: int, last3: float, up: int, **config: Any) -> dict[str, Any]:
    given = {"rounds": 30, "seed": seed, **{name.replace("_", "-"): value for name, value in config.items()}}
    score = {"metric": "accuracy", "last3": last3, "best": last3}
    return {
        "config": given,
        "score": score,
        "bytes": {"up_per_client_round": up, "up_total": 300 * up, "down_total": 300 * up},
    }


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
    assert "| wire-up-bits=3 | 3 | 80.65 | −0.90 | ± 0.25 | 13.0 kB | 7.8 MB |" in shown
    assert imread(tmp_path / "curve.png").shape[0] > 200


def test_what_there_is_no_curve_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One of two ways to give feedback is enough; no bits are not."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RESULTS[:-2]))
    main([str(path), "--against", "wire-up-bits=32", "--plot", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").exists()
    path.write_text(json.dumps([result(seed, 0.8, 9, rank=rank) for rank in (4, 8) for seed in (0, 1)]))
    for more, told in (
        (["--plot", str(tmp_path / "none.png")], "no setting has wire-up-bits"),
        (["--score", "own_last3"], "4 of 4 runs have no score 'own_last3'"),
    ):
        with pytest.raises(SystemExit) as left:
            main([str(path), "--against", "rank=4", *more])
        assert left.value.code == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_losses_are_not_told_in_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = [result(seed, loss, 1000, rank=rank) for rank, loss in ((4, 2.5), (8, 2.25)) for seed in (0, 1)]
    for each in results:
        each["score"]["metric"] = "loss"
    (tmp_path / "r.json").write_text(json.dumps(results))
    main([str(tmp_path / "r.json"), "--against", "rank=4"])
    assert "| rank=8 | 2 | 2.2500 | −0.2500 | ± 0.0000 |" in capsys.readouterr().out


@pytest.mark.parametrize("against", ["rank", "rank=5"])
def test_what_cannot_be_paired_is_one_line(against: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / "r.json"), "--against", against])
    assert left.value.code == 2
    assert "expected" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["sst2", "banking77"])
def test_the_studies_of_the_wire_leave_rates_alone(name: str):
    kinds = {kind: read_study(STUDIES / f"{kind}-{name}.json") for kind in ("wire", "wire-bits")}
    assert {kind: len(configs) for kind, configs in kinds.items()} == {"wire": 15, "wire-bits": 9}
    base = json.loads((STUDIES / f"compare-{name}.json").read_text())["base"]
    assert all(base.items() <= config.items() for config in kinds["wire"])
    for config in [*kinds["wire"], *kinds["wire-bits"]]:
        assert not any(key.startswith("lr-") for key in config)
