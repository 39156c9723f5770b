"""Whole runs on tiny models: what they leave, one history for one seed, stopping and going on."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from simulations.simulate import simulate
from tests.simulations.conftest import Run, read_history, read_summary, small_config
from vblora.errors import ConfigError
from vblora.files import load_state
from vblora.state import initial_state

FILES = {
    "config.json",
    "events.jsonl",
    "history.jsonl",
    "summary.json",
    "score.png",
    "adapter/adapter.safetensors",
    *(f"checkpoints/{part}-0000{number}.safetensors" for part in ("round", "server") for number in range(4)),
}
SUMMARY = {  # what issue 2 asks for
    *("adapter", "model", "data", "clients", "rounds", "seed", "score", "bytes", "parameters", "seconds"),
    "versions",
}


def files(run: Path) -> set[str]:
    """All but what the clients remember."""
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert any(name.startswith("clients/") for name in found)
    return {name for name in found if not name.startswith("clients/")}


# --- What a run leaves ----------------------------------------------------------------------------


def test_files_of_a_run(finished: Path):
    assert files(finished) == FILES
    config = json.loads((finished / "config.json").read_text())
    assert (config["rounds"], config["adapter"], config["rank"]) == (3, "vblora", 0)

    records = read_history(finished)
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    assert [record["replies"] for record in records] == [0, 2, 2, 2]
    for record in records[1:]:
        assert math.isfinite(record["train_loss"])
        assert 0 <= record["score"] <= 1
        assert record["bytes"]["up"] == pytest.approx(2 * record["bytes"]["up_per_client"], abs=1)
        assert sum(record["bytes"]["up_sections"].values()) == record["bytes"]["up"]

    state, blueprint = load_state(finished / "adapter" / "adapter.safetensors")
    newest, _ = load_state(finished / "checkpoints" / "round-00003.safetensors")
    assert state.digest == newest.digest == bytes.fromhex(records[-1]["digest"])
    assert blueprint.labels == ("food", "space", "sport")


def test_summary_of_a_run(finished: Path, tiny_bert: Path, topics: Path):
    summary, records = read_summary(finished), read_history(finished)
    assert set(summary) >= SUMMARY
    assert set(summary["score"]) == {"metric", "start", "final", "best", "last3", "averaged"}
    assert set(summary["bytes"]) >= {
        *("up_per_client_round", "down_per_client_round", "up_total", "down_total", "head")
    }
    assert set(summary["parameters"]) == {"trained", "sent"}

    scores = [record["score"] for record in records]
    assert summary["score"] == {
        "metric": "accuracy",
        "start": scores[0],
        "final": scores[-1],
        "best": max(scores),
        "last3": pytest.approx(sum(scores[-3:]) / 3),
        "averaged": 3,
    }
    assert (summary["adapter"], summary["clients"], summary["rounds"], summary["seed"]) == ("vblora", 4, 3, 0)
    assert (summary["model"], summary["data"]) == (str(tiny_bert), str(topics))
    assert summary["bytes"]["up_total"] == sum(record["bytes"]["up"] for record in records)
    assert summary["bytes"]["up_total"] == pytest.approx(6 * summary["bytes"]["up_per_client_round"], abs=3)
    assert 0 < summary["bytes"]["head"] < 4 * (32 * 3 + 3)
    assert summary["parameters"]["sent"] == 120 * 3 + 64 * 32 + 32 * 3 + 3
    assert summary["parameters"]["trained"] == 120 * 64 + 64 * 32 + 32 * 3 + 3
    assert summary["rejected"] == 0
    assert summary["seconds"] > 0
    assert {"torch", "flwr", "transformers"} <= set(summary["versions"]["client"])


def test_the_plot_shows_something(finished: Path):
    path = finished / "score.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    left, right = np.array_split(pixels[..., :3], 2, axis=1)
    for half in (left, right):  # both panels have lines and letters
        assert 0.005 < (half < 0.5).any(axis=2).mean() < 0.5
        assert len(np.unique(half.reshape(-1, 3), axis=0)) > 20


# --- Tasks and adapters ---------------------------------------------------------------------------


def test_classification_learns(tiny_bert: Path, topics: Path, tmp_path: Path):
    """Random weights under frozen layers: the adapter and the head alone tell the topics apart."""
    config = small_config(
        tiny_bert, topics, tmp_path / "run", rounds=16, local_steps=15, batch_size=16, partition="iid"
    )
    summary = simulate(config | {"lr-head": 0.05, "lr-bank": 0.02})
    assert summary["score"]["last3"] >= 0.65
    assert summary["score"]["start"] < 0.4


def test_lora(fedvb: Run, small: list[str], finished: Path, tmp_path: Path):
    assert fedvb("simulate", *small, "--adapter", "lora", "--rank", "2", "--out", "lora").code == 0
    summary = read_summary(tmp_path / "lora")
    assert files(tmp_path / "lora") == FILES
    assert summary["adapter"] == "lora"
    rows = 2 * (
        9 * (32 + 32) + 2 * (32 + 64) * 2
    )  # pooler, then q, k, v, o and two of the feed-forward a layer
    assert summary["parameters"] == {"trained": rows + 99, "sent": rows + 99}
    up = read_history(tmp_path / "lora")[1]["bytes"]["up_sections"]
    assert set(up) == {"rows", "head", "frame"}
    # Both trainings saw the same texts: the same clients, the same batches.
    both = [read_history(run)[1] for run in (tmp_path / "lora", finished)]
    assert both[0]["examples"] == both[1]["examples"]
    assert both[0]["score"] is not None


@pytest.mark.parametrize(
    ("kind", "options", "section", "numbers"),
    [
        ("ffa-lora", ["--rank", "2"], "rows", 2 * (9 * 32 + 2 * (64 + 32))),
        ("lora-xs", ["--rank", "5"], "cores", 13 * 5 * 5),
        ("uni-lora", ["--theta-length", "700"], "theta", 700),
        ("bank-only", ["--num-vectors", "40"], "bank", 40 * 32),
    ],
)
def test_the_other_kinds(
    fedvb: Run, small: list[str], tmp_path: Path, kind: str, options: list[str], section: str, numbers: int
):
    """A whole run over the wire that is the default, in cohorts of two; what travels is what is trained."""
    shown = fedvb("simulate", *small, "--adapter", kind, *options, "--cohort", "2", "--out", "run")
    assert (shown.code, shown.err) == (0, "")
    assert files(tmp_path / "run") == FILES
    summary = read_summary(tmp_path / "run")
    assert summary["parameters"] == {"trained": numbers + 99, "sent": numbers + 99}
    state, blueprint = load_state(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert blueprint.spec.kind == kind
    assert (state.dense[section] != initial_state(blueprint).dense[section]).any()
    history = read_history(tmp_path / "run")
    assert set(history[1]["bytes"]["up_sections"]) == {section, "head", "frame"}
    assert history[1]["train_loss"] is not None


def test_causal_lm(fedvb: Run, assets: Path, tmp_path: Path):
    source = assets / "data" / "e2e"
    options = [
        *("--model", assets / "models" / "stories260K-hf", "--data", source, "--task", "causal-lm"),
        *("--clients", "3", "--clients-per-round", "2", "--rounds", "3", "--local-steps", "8"),
        *("--max-examples", "120", "--eval-examples", "30", "--max-length", "48", "--partition", "iid"),
    ]
    shown = fedvb("simulate", *options, "--out", "run")
    assert (shown.code, shown.err) == (0, "")
    summary = read_summary(tmp_path / "run")
    assert files(tmp_path / "run") == FILES
    assert summary["score"]["metric"] == "loss"
    assert summary["score"]["best"] < summary["score"]["start"] - 0.1  # of the loss the least is best
    assert summary["bytes"]["head"] == 0


def test_answers_at_the_end_are_scored(fedvb: Run, assets: Path, tmp_path: Path):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("torchmetrics")
    options = [
        *("--model", assets / "models" / "stories260K-hf", "--data", assets / "data" / "e2e"),
        *("--clients", "3", "--clients-per-round", "2", "--rounds", "2", "--local-steps", "2"),
        *("--max-examples", "60", "--eval-examples", "12", "--max-length", "64", "--eval-generate", "5"),
    ]
    shown = fedvb("simulate", *options, "--out", "run")
    assert (shown.code, shown.err) == (0, "")
    texts = read_summary(tmp_path / "run")["score"]["texts"]
    assert set(texts) == {"prompts", "exact_match", "rouge_l", "bleu"}
    assert texts["prompts"] == 5
    assert 0 <= texts["rouge_l"] <= 1
    assert [record["texts"] for record in read_history(tmp_path / "run")] == [{}, {}, texts]


def test_answers_need_prompts(fedvb: Run, small: list[str], tmp_path: Path):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("torchmetrics")
    shown = fedvb("simulate", *small, "--eval-generate", "5", "--out", "run")
    assert shown.code == 2
    assert "eval-generate: the held-out texts have no prompts to answer" in shown.err
    assert not (tmp_path / "run").exists()


def test_causal_lm_on_plain_text(fedvb: Run, assets: Path, tmp_path: Path):
    """Texts far longer than the model reads are cut, without a word from the tokenizer."""
    rows = [{"text": "Once upon a time there was a little dog. " * 200} for _ in range(3)]
    rows += [
        {"text": f"One day {name} went to the park with a ball."} for name in "abcdefghijklmnopqrstuvwxyz"
    ]
    with (tmp_path / "plain.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    options = [
        *("--model", assets / "models" / "stories260K-hf", "--data", "plain.csv", "--partition", "iid"),
        *("--clients", "2", "--clients-per-round", "1", "--rounds", "1", "--local-steps", "2"),
    ]
    shown = fedvb("simulate", *options, "--out", "run")
    assert (shown.code, shown.err) == (0, "")
    assert read_summary(tmp_path / "run")["score"]["metric"] == "loss"


def test_partitions_and_targets(fedvb: Run, small: list[str], tmp_path: Path):
    typed = [
        "--partition",
        "by:site",
        "--target-modules",
        "query,value",
        "--vector-length",
        "24",
        "--topk",
        "1",
    ]
    assert fedvb("simulate", *small, *typed, "--rounds", "1", "--out", "run").code == 0
    _, blueprint = load_state(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert {linear.name.rsplit(".")[-1] for linear in blueprint.linears} == {"query", "value"}
    assert (blueprint.vector_length, blueprint.cut_rows > 0) == (24, True)


def test_evaluation_can_be_thinned(tiny_bert: Path, topics: Path, tmp_path: Path):
    simulate(small_config(tiny_bert, topics, tmp_path / "run", rounds=4, eval_every=3, eval_examples=10))
    records = read_history(tmp_path / "run")
    assert [record["score"] is None for record in records] == [False, True, True, False, False]
    assert {record["eval_examples"] for record in records} == {0, 10}


# --- One seed, one history ------------------------------------------------------------------------


def test_one_seed_gives_one_history(finished: Path, tiny_bert: Path, topics: Path, tmp_path: Path):
    simulate(small_config(tiny_bert, topics, tmp_path / "again"))
    assert read_history(tmp_path / "again") == read_history(finished)
    first, again = read_summary(finished), read_summary(tmp_path / "again")
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert (tmp_path / "again" / "config.json").read_text() == (finished / "config.json").read_text()

    simulate(small_config(tiny_bert, topics, tmp_path / "other", seed=1))
    assert read_history(tmp_path / "other")[1]["digest"] != read_history(finished)[1]["digest"]


# --- Stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 8, 13])
def test_stopped_after_so_many_steps_and_resumed(
    steps: int, finished: Path, tiny_bert: Path, topics: Path, tmp_path: Path
):
    """A round has 2 clients of 3 steps: stopped before the first step, in round 1, in round 2, in round 3."""
    out = tmp_path / "run"
    taken = iter(range(steps))

    def stop(done: int, total: int) -> None:
        if next(taken, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(small_config(tiny_bert, topics, out), on_step=stop)
    assert not (out / "summary.json").exists()
    assert len(read_history(out)) == 1 + steps // 6
    simulate(small_config(tiny_bert, topics, out, resume=True))
    assert read_history(out) == read_history(finished)
    assert files(out) == FILES


def test_ctrl_c_on_the_command_line(
    fedvb: Run, small: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from simulations.progress import Display

    taken = iter(range(8))

    def stop(display: Display, done: int, total: int) -> None:
        if next(taken, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "on_step", stop)
        stopped = fedvb("simulate", *small, "--out", "run")
    assert (stopped.code, stopped.err) == (130, "")
    told = "stopped: round 1 is saved; go on with: fedvb simulate --resume --out run"
    assert stopped.out.splitlines()[-1] == told

    resumed = fedvb("simulate", "--resume", "--out", "run")
    assert resumed.code == 0
    assert "resumed after round 1" in resumed.out.splitlines()
    assert read_history(tmp_path / "run") == read_history(finished)

    assert fedvb("simulate", "--resume", "--out", "run").code == 0  # nothing is left to do
    assert read_history(tmp_path / "run") == read_history(finished)


def test_another_run_cannot_go_on_from_this_one(run_copy: Path, tiny_bert: Path, topics: Path):
    """On Flower's engine too, where nothing else stands before the ServerApp."""
    before = (run_copy / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"resume: lr-bank is 0\.1, the run has"):
        simulate(small_config(tiny_bert, topics, run_copy, resume=True, lr_bank=0.1))
    assert (run_copy / "config.json").read_text() == before


def test_a_finished_run_goes_on_for_more_rounds(fedvb: Run, run_copy: Path):
    before = read_history(run_copy)
    assert fedvb("simulate", "--resume", "--out", run_copy, "--rounds", "5").code == 0
    assert read_history(run_copy)[:4] == before
    assert read_summary(run_copy)["rounds"] == 5
    assert json.loads((run_copy / "config.json").read_text())["rounds"] == 5


# --- How the device is used -----------------------------------------------------------------------


def test_less_memory_is_the_same_training(finished: Path, tiny_bert: Path, topics: Path, tmp_path: Path):
    """Checkpointed blocks and inputs made anew give the same bits, pieces the same sums in another order."""
    expected = read_history(finished)
    for changes in ({"checkpointing": True, "recompute": True}, {"accumulate": 3}):
        out = tmp_path / "-".join(changes)
        simulate(small_config(tiny_bert, topics, out, **changes))
        for found, plain in zip(read_history(out), expected, strict=True):
            if found["round"]:
                assert found["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-3)


def test_graphs_are_for_gpus(tiny_bert: Path, topics: Path, tmp_path: Path):
    config = small_config(tiny_bert, topics, tmp_path / "run", device="cpu", cuda_graphs=True)
    with pytest.raises(ConfigError, match="--cuda-graphs: the base is on a CPU"):
        simulate(config)
