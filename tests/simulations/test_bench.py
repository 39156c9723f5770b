"""The benches, on sizes that say nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fl_client.settings import SiteSettings
from simulations.bench import cohort, engines, learning, step, steps, ways
from simulations.bench.crowd import measure_overhead, measure_scale
from simulations.bench.engines import Engine, apart, measure_engines
from simulations.bench.shapes import SHAPES, Shape
from simulations.bench.tables import print_table
from tests.conftest import ROOT
from tests.simulations.conftest import Run, small_config

TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1100,
}
TINY_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 1100,
    "num_labels": 5,
}


@pytest.mark.parametrize("sizes", [TINY_LLAMA, TINY_BERT], ids=["llama", "bert"])
def test_steps_of_cohorts_and_of_peft(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft")
    import torch

    monkeypatch.setitem(SHAPES, "minilm", Shape(sizes, 1, 8, 64, 16, (1, 3)))
    found = steps.measure_shape("minilm", torch.device("cpu"), 2, 3)
    rows = {(row["name"], row["clients"]): row for row in found["rows"]}
    assert list(rows) == [("vb-lora r4", 1), ("vb-lora r4", 3), ("peft lora r8", 1), ("peft lora r4", 1)]
    assert rows["vb-lora r4", 1]["to_alone"] == rows["peft lora r8", 1]["to_peft"] == 1.0
    for row in rows.values():
        ratio = row["steps_per_second"] * row["step_ms"] / row["clients"] / 1e3
        assert 0.2 < ratio < 5, "of medians, on a machine that does other things"
    json.dumps(found)


def test_what_does_not_fit_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setitem(SHAPES, "minilm", Shape(TINY_LLAMA, 1, 8, 64, 16, (1, 3)))
    train_cohort = ways.train_cohort

    def tight(model: Any, task: Any, state: Any, jobs: Any, *others: Any, **options: Any) -> Any:
        if len(jobs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_cohort(model, task, state, jobs, *others, **options)

    monkeypatch.setattr(ways, "train_cohort", tight)
    found = steps.measure_shape("minilm", torch.device("cpu"), 1, 2)
    assert "vb-lora r4 × 3: out of memory" in found["notes"]
    assert 3 not in {row["clients"] for row in found["rows"]}


# --- One client's step ---------------------------------------------------------------


@pytest.mark.parametrize("sizes", [TINY_LLAMA, TINY_BERT], ids=["llama", "bert"])
def test_one_step_in_all_ways(
    sizes: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    pytest.importorskip("peft")
    monkeypatch.setitem(SHAPES, "minilm", Shape(sizes, 1, 8, 64, 16, (1,)))
    found = step.run(["minilm"], ["2x8", "1x12"], tmp_path / "out.json", repeats=2)
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert [table["tokens"] for table in found["tables"]] == ["2x8", "1x12"]
    for table in found["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        theirs = ["peft lora r4", "peft lora r8", "peft vb-lora r4"]
        assert list(rows) == ["frozen base", "ours", "ours, inputs recomputed", *theirs]
        assert rows["frozen base"]["to_base"] == rows["ours"]["to_ours"] == 1.0
        assert table["notes"] == []
    assert "minilm, 1x12 tokens a step" in capsys.readouterr().out
    step.main(["--table", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| minilm, 2x8 tokens a step | ms a step | × base |")
    assert lines[4].startswith("| frozen base | ")


def test_a_way_that_does_not_fit_leaves_the_table(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setitem(SHAPES, "minilm", Shape(TINY_LLAMA, 1, 8, 64, 16, (1,)))
    peft_step = step.peft_step

    def tight(model: Any, task: Any) -> Any:
        inner = peft_step(model, task)

        def run(batch: Any) -> None:
            if "vblora" in type(model.base_model).__module__ and batch.tokens.numel() > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            inner(batch)

        return run

    monkeypatch.setattr(step, "peft_step", tight)
    small, large = step.measure("minilm", ["1x8", "1x9"], torch.device("cpu"), 1, 2)
    assert small["rows"][-1]["name"] == "peft vb-lora r4"
    assert large["rows"][-1]["name"] == "peft lora r8"
    assert (small["notes"], large["notes"]) == ([], ["peft vb-lora r4: out of memory"])


WITHOUT_FLOWER = """
import sys
for name in ("flwr", "flwr_datasets", "datasets", "ray", "rich", "matplotlib", "peft", "sklearn"):
    sys.modules[name] = None
import json
from pathlib import Path
import torch
from simulations.bench import learning, steps
from simulations.bench.cohort import main
from simulations.bench.shapes import SHAPES, Shape

config, folder, sizes = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
assert learning.run_one(config, folder)["rounds"] == 2
SHAPES["minilm"] = Shape(sizes, 1, 8, 64, 16, (1,))
assert steps.measure_shape("minilm", torch.device("cpu"), 1, 2)["notes"] == [
    "PEFT is not installed: its rows are left out"
]
main(["--part", "overhead"])
"""


def test_benches_run_with_torch_and_transformers_alone(tiny_bert: Path, topics: Path, tmp_path: Path):
    """The texts are prepared where the data libraries are; a bench that needs Flower is left out."""
    config = small_config(tiny_bert, topics, tmp_path / "run", rounds=2, max_examples=40)
    learning.prepare([config], tmp_path)
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLOWER, json.dumps(config), tmp_path, json.dumps(TINY_BERT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "overhead: left out (No module named 'flwr" in shown.stdout


# --- Rounds --------------------------------------------------------------------------


def test_a_round_without_training_costs_little():
    found = measure_overhead(30, 2)
    assert found["clients"] == 30
    assert [row["processes"] for row in found["wire"]] == [1, 2]
    one, two = (row["update_bytes"] for row in found["wire"])
    assert 10_000 < one == two < 40_000
    assert found["opaque_seconds"] > 0
    assert all(row["seconds"] > 0 for row in found["wire"])


@pytest.mark.slow
def test_two_thousand_clients_fit_in_memory():
    found = apart(measure_scale, 2000, 20, 5)
    assert len(found["mb_after_round"]) == 6
    assert found["mb_after_round"][0] - found["mb_with_data_and_model"] < 100, "what registering takes"
    assert found["mb_grown"] < 50


@pytest.mark.slow
def test_ten_thousand_clients_fit_in_memory():
    found = apart(measure_scale, 10_000, 100, 20)
    assert found["mb_after_round"][0] - found["mb_with_data_and_model"] < 400
    assert found["mb_grown"] < 200


@pytest.mark.ray
@pytest.mark.slow
def test_both_engines_train_the_same(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "ENGINES", (Engine("ray", 2), Engine("ours", 1), Engine("ours", 2)))
    found = measure_engines(1, 4, 3, str(tiny_bert))
    assert found["notes"] == []
    assert [row["engine"].split(",")[0] for row in found["rows"]] == ["ray", "ours", "ours"]
    losses = [row["train_loss"] for row in found["rows"]]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
    assert all(row["to_ray"] > 0 and len(row["rounds"][0]) == 2 for row in found["rows"])


def test_without_ray_its_row_is_left_out(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    def run(engine: Engine, config: dict[str, Any]) -> list[dict[str, Any]]:
        if engine.name == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return [{"seconds": 1.0, "train_loss": 1.5}] * 4

    monkeypatch.setattr(engines, "apart", lambda function, *arguments: run(*arguments))
    found = measure_engines(2, 2, 3, str(tiny_bert))
    assert found["notes"] == [f"{engines.ENGINES[0]}: left out (No module named 'ray')"]
    assert {row["to_ray"] for row in found["rows"]} == {None}
    assert len(found["rows"]) == len(engines.ENGINES) - 1


# --- What is shown -------------------------------------------------------------------


@pytest.mark.parametrize("rich", [True, False])
def test_tables_need_no_rich(rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    rows = [("one", 1.25), ("another", 10.0)]
    print_table("A title", rows, {"name": lambda row: row[0], "ms": lambda row: f"{row[1]:.1f}"}, ["a note"])
    shown = capsys.readouterr().out
    for expected in ("A title", "name", "another", "1.2", "10.0", "a note"):
        assert expected in shown
    if not rich:
        assert shown.splitlines()[2:5] == ["name       ms", "one       1.2", "another  10.0"]


def result(mean: float, own: float | None = None, metric: str = "accuracy", **config: Any) -> dict[str, Any]:
    score: dict[str, Any] = {"metric": metric, "last3": mean, "best": mean}
    if own is not None:
        score |= {"own_last3": own, "own_std": 0.1}
    return {"config": config, "score": score, "bytes": {"up_per_client_round": 2000}}


def test_processes_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    """One run that sizes its own cohorts must not take what the others need."""
    given: list[float] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(learning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(learning.torch.cuda, "set_per_process_memory_fraction", given.append)
    for number in range(3):
        learning._take_gpu(number, processes=3)
    assert sum(given) == pytest.approx(learning.MEMORY)


def test_prepared_texts_are_those_of_a_model(tmp_path: Path):
    """Another tokenizer's numbers would be trained on without a word."""
    named = {name: SiteSettings.from_run_config({"model": name}) for name in ("minilm", "./other")}
    assert len({learning.texts_file(tmp_path, settings) for settings in named.values()}) == 2


def test_a_study_without_all_its_runs_has_not_gone_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    study = tmp_path / "study.json"
    study.write_text(json.dumps({"runs": [{}], "seeds": [0, 1]}))
    monkeypatch.setattr(learning, "in_processes", lambda *_: iter(()))  # as where --seconds is over
    for typed, told in (([], "0 of 2 runs"), (["--processes", "0"], "0 is less than 1")):
        with pytest.raises(SystemExit) as left:
            learning.main([str(study), *typed])
        shown = capsys.readouterr()
        assert left.value.code == (2 if typed else 1)
        assert told in shown.out + shown.err


def test_studies_rank_by_what_is_better():
    def order(*results: dict[str, Any]) -> list[str]:
        return [line.split()[-1] for line in learning.table(list(results)).splitlines()[1:]]

    assert order(result(0.1, h=1), result(0.3, h=2), result(0.2, h=3)) == ["h=2", "h=3", "h=1"]
    assert order(result(2.0, metric="loss", h=1), result(1.0, metric="loss", h=2)) == ["h=2", "h=1"]
    assert order(result(0.3, 0.1, h=1), result(0.1, 0.3, h=2)) == ["h=2", "h=1"], "own scores decide"
    assert order(result(0.3, h=1), result(0.1, 0.3, h=2)) == ["h=1", "h=2"], "unless some run has none"
    seeds = learning.table([result(0.2, 0.5, h=1, seed=0), result(0.4, 0.7, h=1, seed=1)])
    assert "0.6000 0.1414 0.1000  0.3000 0.1414" in seeds
    answered = result(1.0, metric="loss", h=1)
    answered["score"]["texts"] = {"bleu": 12.5, "rouge_l": 0.25}
    assert " 12.50  0.2500 " in learning.table([answered])
    assert "BLEU" not in learning.table([answered, result(1.0, metric="loss", h=2)])


def test_every_part_prints_its_table_and_writes_its_numbers(
    fedvb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(SHAPES, "minilm", replace(SHAPES["minilm"], sizes=TINY_BERT, cohorts=(1, 2)))
    small = {
        "measure_overhead": lambda clients, rounds: measure_overhead(5, 2, (1,)),
        "measure_scale": lambda clients, per_round, rounds: measure_scale(20, 3, 6),
    }
    monkeypatch.setattr(engines, "apart", lambda function, *arguments: small[function.__name__](*arguments))
    options = [part for name in ("gpu", "overhead", "scale") for part in ("--part", name)]
    shown = fedvb("bench", "cohort", *options, "--repeats", "1", "--json", "out.json")
    assert (shown.code, shown.err) == (0, "")
    assert list(json.loads((tmp_path / "out.json").read_text())["parts"]) == ["gpu", "overhead", "scale"]
    for expected in ("steps/s", "opaque", "default wire", "20 clients", "round 5"):
        assert expected in shown.out


def test_the_same_parts_both_ways(monkeypatch: pytest.MonkeyPatch, fedvb: Run):
    from simulations.bench.commands import Part

    assert [part.value for part in Part] == list(cohort.PARTS)
    calls: list[Any] = []
    monkeypatch.setattr(cohort, "run", lambda *arguments: calls.append(arguments))
    cohort.main(["--part", "cpu", "--repeats", "2"])
    assert fedvb("bench", "cohort", "--part", "cpu", "--repeats", "2").code == 0
    cohort.main([])
    assert calls == [(["cpu"], None, 2, None), (["cpu"], None, 2), (list(cohort.PARTS), None, 5, None)]
