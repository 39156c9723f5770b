"""Where results come from, and rates that were chosen before."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from simulations.bench import learning, origin
from simulations.bench.origin import commit_of_code, read_results, retold_commands, with_rates
from simulations.bench.rivals import RATES, tables
from tests.conftest import ROOT
from tests.simulations.test_rivals import COMPARED, STUDIES, result, tried
from vblora.errors import RunError


def trial(seed: int, score: float, **config: Any) -> dict[str, Any]:
    return result(seed, [0.5, score, score, score], 10, **{"eval_split": "train", **config})


TRIALS = [
    *(trial(seed, 0.7, adapter="lora", rank=8, lr_rows=0.001) for seed in (1000, 1001)),
    *(trial(seed, 0.8 - (seed == 1001) / 10, adapter="lora", rank=8, lr_rows=0.002) for seed in (1000, 1001)),
    trial(1000, 0.9, adapter="lora", rank=8, lr_rows=0.004),  # the other seed broke off
    *(trial(seed, 0.6, adapter="lora", rank=32, lr_rows=0.004) for seed in (1000, 1001)),
    *(trial(seed, 0.6, num_vectors=256, lr_bank=0.004) for seed in (1000, 1001)),
    *(trial(seed, 0.5, num_vectors=256, lr_bank=0.008) for seed in (1000, 1001)),
]


def test_each_method_gets_its_best_rate():
    configs = [
        {"adapter": "lora", "rank": 8, "seed": 0, "partition": "iid"},
        {"adapter": "lora", "rank": 32, "seed": 0},
        {"num-vectors": 256, "seed": 3, "lr-bank": 1.0},
    ]
    assert with_rates(configs, TRIALS) == [
        {**configs[0], "lr-rows": 0.002},
        {**configs[1], "lr-rows": 0.004},
        {**configs[2], "lr-bank": 0.004},
    ]


def test_of_losses_the_least_is_the_best():
    trials = [trial(1000, 2.0, adapter="lora", lr_rows=0.1), trial(1000, 1.0, adapter="lora", lr_rows=0.2)]
    for one in trials:
        one["score"]["metric"] = "loss"
    assert with_rates([{"adapter": "lora"}], trials) == [{"adapter": "lora", "lr-rows": 0.2}]


def test_a_rate_is_tried_with_the_seeds_of_the_others_and_in_one_way():
    low = [trial(seed, 0.7, adapter="lora", lr_rows=0.1) for seed in (1000, 1001)]
    high = [trial(seed, 0.9, adapter="lora", lr_rows=0.2) for seed in (1001, 1002)]
    twice = [trial(1000, 0.8, adapter="lora", lr_rows=0.4)] * 2  # a file given twice is one trial
    assert with_rates([{"adapter": "lora"}], [*low, *high, *twice]) == [{"adapter": "lora", "lr-rows": 0.1}]
    skewed = trial(1000, 0.9, adapter="lora", lr_rows=0.1, partition="iid")
    with pytest.raises(RunError, match=r"docstrings was tried in 2 ways: .*; .*partition iid"):
        with_rates([{"adapter": "lora"}], [*low, skewed])


def test_rates_are_never_chosen_on_what_is_compared():
    with pytest.raises(RunError, match=r"eval-split 'dev\+test', expected 'train'"):
        with_rates([], [*TRIALS, trial(0, 0.9, adapter="lora", eval_split="dev+test")])
    with pytest.raises(RunError, match=r"rates: .*ffa-lora.* was not tried"):
        with_rates([{"adapter": "ffa-lora"}], TRIALS)


@pytest.mark.parametrize(
    ("compared", "rates"),
    [*COMPARED.items(), ("compare-crowds", COMPARED["compare-sst2"])],
)
def test_the_rates_of_a_comparison_were_tried_on_training_texts(compared: str, rates: Sequence[str]):
    def method(config: dict[str, Any]) -> list[Any]:
        return [config.get(key) for key in ("adapter", "rank", "theta-length", "lr-rows", "lr-bank")]

    named = [config for config in learning.read_study(STUDIES / f"{compared}.json") if {*config} & {*RATES}]
    assert named
    assert all(method(config) in [method(one) for one in tried(rates)] for config in named)


def test_the_commit_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def git(*arguments: str) -> None:
        named = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *named, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(origin, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of_code() == ""
    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    commit = commit_of_code()
    assert len(commit) == 7
    (tmp_path / "code.py").write_text("2")
    assert commit_of_code() == f"{commit}+"


TOLD: dict[str, Any] = {"config": {}, "score": {}, "bytes": {}, "origin": {"command": "python rates"}}


def test_the_commands_name_no_path_of_this_machine(tmp_path: Path):
    inside, rates = STUDIES / "compare-sst2.json", tmp_path / "rates.json"
    rates.write_text(json.dumps([TOLD] * 2))
    assert retold_commands(inside, [rates]).splitlines() == [
        "python rates --json rates.json",
        f"python -m simulations.bench.learning {inside.relative_to(ROOT)} --texts texts --rates rates.json",
    ]
    assert retold_commands(tmp_path / "other.json", []) == (
        "python -m simulations.bench.learning other.json --texts texts"
    )


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"score": 1}]', '[{"config": {}}]'])
def test_files_of_others_are_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(RunError, match="expected what --json wrote"):
        read_results([tmp_path / "r.json"])
    with pytest.raises(SystemExit) as left:
        learning.main(["--table", str(tmp_path / "r.json")])
    assert left.value.code == 2
    assert "expected what --json wrote" in capsys.readouterr().err.splitlines()[-1]


def test_rows_name_their_commit_and_rate_and_tables_their_command():
    results = [
        result(0, [0.5, 0.8], 1000, adapter="lora", rank=8, lr_rows=0.002, data="../data/sst2"),
        result(0, [0.5, 0.79], 10, adapter="vblora", lr_bank=0.008, data="../data/sst2"),
    ]
    for one, commit in zip(results, ("abc1234", "def5678"), strict=True):
        one["origin"] = {"command": "python -m this study.json", "commit": commit, "device": "H100"}
        one["versions"] = {"client": {"torch": "2.13.0"}}
    shown = tables(results)
    assert shown.startswith("minilm on sst2; 10 clients, 5 a round, 1 rounds, 10 local steps of 16 texts")
    assert "; 1 seed; H100, torch 2.13.0." in shown
    assert "| 0.008 | def5678 |" in shown
    assert shown.endswith("```sh\npython -m this study.json\n```")


# --- A study, run --------------------------------------------------------------------


@pytest.fixture
def study(tiny_bert: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a study of two runs, trained in this process: that is quicker."""

    def here(work: Any, items: Sequence[Any], *_: Any) -> Iterator[tuple[Any, Any]]:
        return ((item, work(item)) for item in items)

    monkeypatch.setattr(learning, "in_processes", here)
    base = {"model": str(tiny_bert), "data": str(topics), "clients": 2, "clients-per-round": 2, "rounds": 1}
    base |= {"local-steps": 1, "batch-size": 2, "max-length": 16, "partition": "iid", "max-examples": 40}
    content = {"base": base, "runs": [{"adapter": "lora"}, {"num-vectors": 8, "vector-length": 8}]}
    (tmp_path / "study.json").write_text(json.dumps(content))
    learning.main([str(tmp_path / "study.json"), "--texts", str(tmp_path), "--prepare"])
    return [str(tmp_path / "study.json"), "--texts", str(tmp_path), "--json", str(tmp_path / "r.json")]


def test_a_study_keeps_where_it_comes_from(
    study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    learning.main([*study, "--commit", "abc1234"])
    assert {one["origin"]["commit"] for one in read_results([tmp_path / "r.json"])} == {"abc1234"}
    assert "| abc1234 |" in capsys.readouterr().out


def test_a_process_that_is_killed_costs_its_run(
    study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def killing(work: Any, items: Sequence[Any], *_: Any) -> Iterator[tuple[Any, Any]]:
        yield items[0], None
        yield items[1], work(items[1])

    monkeypatch.setattr(learning, "in_processes", killing)
    with pytest.raises(SystemExit) as left:
        learning.main(study)
    assert left.value.code == 1
    shown = capsys.readouterr().out
    assert "its process died; fewer --processes if memory was short" in shown
    assert "1 of 2 runs; torch " in shown
    assert len(read_results([tmp_path / "r.json"])) == 1
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2


def test_results_that_cannot_be_kept_are_not_worked_for(study: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        learning.main([*study[:-1], "nowhere/r.json"])
    assert left.value.code == 2
    told = "--json: nowhere/r.json cannot be written; expected a file in a folder that is there"
    shown = capsys.readouterr()
    assert shown.err.endswith(f"{told}\n")
    assert shown.out.count("last3") == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "not readable ("),
        ("{", "not readable ("),
        ("[]", "not an object"),
        ('{"base": {}}', "no list of runs"),
        ('{"runs": []}', "no list of runs"),
        ('{"runs": [1]}', "base or a run is not an object"),
        ('{"runs": [{}], "seeds": 3}', "seeds is 3"),
        ('{"runs": [{"adpter": "lora"}], "bass": {}}', "unknown parts: bass; unknown keys: adpter"),
    ],
)
def test_what_is_no_study(content: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as left:
        learning.main([str(path)])
    assert left.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}: {told}" in line
    assert '{"base": {...}, "runs": [{...}, ...], "seeds": [0, ...]}' in line
