"""What is typed wrong costs one clear line; what is printed fits a terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.text import Text

import fl_client.site
from fl_server.config_file import CONFIG_FILE, read_config
from simulations.cli import app
from tests.simulations.conftest import Outcome, Run, read_history

WIDTH = 80
ISSUE_2 = """model data task clients clients-per-round rounds local-steps batch-size max-length max-examples
adapter rank num-vectors vector-length topk target-modules partition seed device out resume"""


def refused(outcome: Outcome, run: Path) -> str:
    """The one line of an error, after seeing that it is one and that no run directory was made."""
    assert outcome.code == 2
    assert outcome.err.startswith("fedvb: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.out
    assert not run.exists()
    return outcome.err


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--text-column txt", "no text column 'txt'; found 'text', 'label', 'site'; did you mean 'text'?"),
        ("--label-column ward", "no label column 'ward'"),
        (
            "--label-column text",
            "found no text column among 'text', 'label', 'site'; name it with --text-column",
        ),
        ("--partition by:ward", "no group column 'ward'"),
        ("--adapter dora", "adapter is 'dora', expected one of vblora, lora"),
        ("--task nli", "task is 'nli', expected one of auto, classification, causal-lm"),
        ("--partition random", "partition is 'random', expected auto, iid, dirichlet:ALPHA"),
        ("--partition dirichlet:0", "alpha is '0', expected a positive number"),
        ("--schedule linear", "schedule is 'linear', expected one of cosine, root, constant"),
        ("--clients-per-round 5", "clients-per-round is 5 but there are 4 clients"),
        ("--clients 0", "clients is 0"),
        ("--clients 300 --partition iid", "client 216 would be empty"),
        ("--clients 60 --partition dirichlet:0.001", "is empty"),
        ("--clients 8 --partition by:site", "client 7 would be empty, 7 values of 'site' cannot fill 8"),
        ("--max-examples 3", "client 3 would be empty"),
        ("--topk 9 --num-vectors 8", "choose k <= h"),
        ("--topk 0", "topk (k) is 0"),
        ("--vector-length 0", "'--vector-length': 0 is not in the range x>=1"),
        ("--num-vectors 0", "'--num-vectors': 0 is not in the range x>=1"),
        ("--rank 0", "'--rank': 0 is not in the range x>=1"),
        ("--rank -4", "'--rank': -4 is not in the range x>=1"),
        ("--rank 5000", "rank is 5000, expected 1 to 1024"),
        ("--adapter lora --rank 5000", "rank is 5000, expected 1 to 1024"),
        ("--alpha -1", "alpha is -1"),
        ("--target-modules nope", "'nope' fits no linear layer; the base has dense, key, query, value"),
        ("--cohort -1", "cohort is -1"),
        ("--workers -1", "'--workers': -1 is not in the range x>=0"),
        ("--dropout 1", "dropout is 1.0, expected 0 to below 1"),
        ("--rounds 0", "rounds is 0"),
        ("--rounds many", "'--rounds': 'many' is not a valid integer"),
        ("--lr-bank fast", "'--lr-bank': 'fast' is not a valid float"),
        ("--lr-bank nan", "lr-bank is nan"),
        ("--local-steps 0", "local-steps is 0"),
        ("--batch-size 0", "batch-size is 0"),
        ("--max-length 1", "max-length is 1"),
        ("--max-examples -1", "max-examples is -1"),
        ("--eval-every 0", "eval-every is 0"),
        ("--eval-split nightly", "eval-split is 'nightly'"),
        ("--eval-split test", "no split 'test' to evaluate on"),
        ("--seed -1", "seed is -1"),
        ("--device abacus", "--device: 'abacus' cannot be used here"),
        ("--dtype decimal", "--dtype: 'decimal' is unknown"),
        (
            "--model nobody/nothing",
            "--model: nobody/nothing cannot be loaded (offline: HF_HUB_OFFLINE is set)",
        ),
        ("--model ./nowhere", "--model: ./nowhere is no folder"),
        ("--data nowhere.csv", "nowhere.csv: no such file or folder"),
        ("--data nobody/nothing", "neither a local file or folder nor a hub data set within reach"),
        ("--resume", "no run here"),
        ("--colour", "No such option '--colour'"),
        ("surplus", "Got unexpected extra argument (surplus)"),
        ("--data", "Option '--data' requires an argument"),
    ],
)
def test_bad_options(fedvb: Run, small: list[str], tmp_path: Path, typed: str, told: str):
    out = tmp_path / "run"
    assert told in refused(fedvb("simulate", *small, "--out", out, *typed.split()), out)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("latin1.csv", "text,label\ncafé,1\n".encode("latin1"), "cannot be read as csv"),
        ("cut.json", b'{"text": [', "cannot be read as json"),
        ("noise.parquet", bytes(range(256)), "cannot be read as parquet"),
        ("notes.docx", b"PK", "cannot tell the format by its name"),
        ("header.csv", b"text,label\n", "the file has no rows"),
        ("blank.csv", b"text,label\n" + b"apple,\n" * 9, "found no row with text in all of 'text', 'label'"),
        (
            "same.csv",
            b"text,label\n" + b"apple,1\n" * 9,
            "9 rows are too few to hold some out",
        ),
        ("one.csv", b"text,label\n" + b"apple,1\nball,1\n" * 9, "holds one value only, '1'"),
        ("numbers.csv", b"1,2\n3,4\n", "found neither a text column nor a prompt and a completion"),
    ],
)
def test_unreadable_data(fedvb: Run, small: list[str], tmp_path: Path, name: str, content: bytes, told: str):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "run"
    assert told in refused(fedvb("simulate", *small, "--out", out, "--data", name), out)


def test_labels_that_only_the_evaluated_part_has(fedvb: Run, small: list[str], tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\n" + "apple,food\nball,sport\n" * 20)
    (tmp_path / "data" / "dev.csv").write_text("text,label\nmoon,space\nball,sport\n")
    out = tmp_path / "run"
    told = refused(fedvb("simulate", *small, "--out", out, "--data", "data"), out)
    assert "1 values in the evaluated part that train does not have ('space')" in told


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "has no config.json"),
        ("{", "cannot be loaded: "),
        ('{"model_type": "bert"}', "no file named model.safetensors"),
        ('{"model_type": "unheard-of"}', "cannot be loaded: "),
        ('{"model": "minilm", "dtype": "auto", "rounds": 3}', "cannot be loaded: "),  # a run directory
    ],
)
def test_folders_that_are_no_model(
    fedvb: Run, small: list[str], tmp_path: Path, config: str | None, told: str
):
    (tmp_path / "model").mkdir()
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(config)
    out = tmp_path / "run"
    line = refused(fedvb("simulate", *small, "--out", out, "--model", "./model"), out)
    assert told in line
    assert "offline" not in line  # which has nothing to do with it


def test_a_model_without_weights_that_can_be_read(
    fedvb: Run, small: list[str], tmp_path: Path, tiny_bert: Path
):
    shutil.copytree(tiny_bert, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    out = tmp_path / "run"
    refused(fedvb("simulate", *small, "--out", out, "--model", "./model"), out)


def test_texts_longer_than_the_model_reads(fedvb: Run, small: list[str], tmp_path: Path):
    (tmp_path / "long.csv").write_text(
        "text,label\n" + "".join(f"{'apple ' * (90 + row)},{row % 2}\n" for row in range(40))
    )
    out = tmp_path / "run"
    told = refused(fedvb("simulate", *small, "--out", out, "--data", "long.csv"), out)
    assert "--max-length: a text has 128 tokens, the model reads 64; use 64" in told


def test_places_that_cannot_hold_a_run(fedvb: Run, small: list[str], tmp_path: Path, finished: Path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        told = fedvb("simulate", *small, "--out", out)
        assert (told.code, told.err) == (
            2,
            f"fedvb: --out: {tmp_path}/file is a file, expected a directory that can be made or is a run\n",
        )
    before = sorted(finished.rglob("*"))
    told = fedvb("simulate", *small, "--out", finished)
    assert (told.code, told.err) == (
        2,
        f"fedvb: {finished}: taken by a run; go on with resume=true (fedvb: --resume) or choose another "
        "out\n",
    )
    assert sorted(finished.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission(fedvb: Run, small: list[str], tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o500)
    out = tmp_path / "closed" / "run"
    assert "cannot be written to" in refused(fedvb("simulate", *small, "--out", out), out)


def test_resume_what_is_no_run_or_another_one(fedvb: Run, run_copy: Path, tmp_path: Path):
    nowhere = tmp_path / "nowhere"
    assert "no run here" in refused(fedvb("simulate", "--resume", "--out", nowhere), nowhere)
    assert "name it with --out" in refused(fedvb("simulate", "--resume"), nowhere)

    config, history = run_copy / CONFIG_FILE, read_history(run_copy)
    before = config.read_text()
    for typed, told in (
        (["--seed", "1"], "seed is 1, the run has 0; leave them out, or start another run"),
        (
            ["--lr-bank", "0.1", "--adapter", "lora"],
            "adapter is 'lora', the run has 'vblora'; lr-bank is 0.1",
        ),
        (["--rounds", "2"], "rounds is 2, the run has finished round 3"),
    ):
        outcome = fedvb("simulate", "--resume", "--out", run_copy, *typed)
        assert told in refused(outcome, nowhere)
    assert config.read_text() == before
    assert read_history(run_copy) == history

    config.unlink()
    assert "no run here" in refused(fedvb("simulate", "--resume", "--out", run_copy), nowhere)


def test_resume_with_other_cohorts_and_processes(fedvb: Run, run_copy: Path):
    """Results are equal up to rounding then: told in a line, and kept for the next time."""
    typed = ["simulate", "--resume", "--out", run_copy, "--rounds", "4"]
    plain = fedvb(*typed)
    assert (plain.code, plain.err) == (0, "")
    assert "up to rounding" not in plain.out

    note = "cohort is 1, the run had 0; workers is 1, the run had 0: it goes on equal up to rounding, "
    told = fedvb(*typed, "--cohort", "1", "--workers", "1")
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith(note + "not bit for bit\n")
    kept = read_config(run_copy)
    assert (kept["cohort"], kept["workers"], kept["rounds"]) == (1, 1, 4)
    assert "up to rounding" not in fedvb(*typed).out


def test_export_needs_a_run_with_a_checkpoint(fedvb: Run, run_copy: Path, tmp_path: Path):
    out = tmp_path / "adapter"
    assert "no run here" in refused(fedvb("export", tmp_path / "nowhere", "--out", out), out)
    assert "Missing option '--out'" in refused(fedvb("export", run_copy), out)
    told = fedvb("export", run_copy, "--out", out, "--format", "gguf")
    assert "'gguf' is not one of 'peft', 'lora', 'merged'" in refused(told, out)
    (tmp_path / "file").write_text("mine")
    told = fedvb("export", run_copy, "--out", tmp_path / "file" / "below")
    assert (told.code, told.err.count("\n")) == (2, 1)
    for path in (run_copy / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert "no readable checkpoint" in refused(fedvb("export", run_copy, "--out", out), out)
    shutil.rmtree(run_copy / "checkpoints")
    assert "no checkpoint yet" in refused(fedvb("export", run_copy, "--out", out), out)


def test_bad_input_in_a_process_of_its_own(small: list[str], tmp_path: Path):
    """Nothing else writes to standard error: no warning of a library, no progress bar."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "simulations.cli", "simulate", *small, "--out", str(out), "--topk", "99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(Outcome(done.returncode, done.stdout, done.stderr), out)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            "train_cohort",
            "out of memory with one client: lower --batch-size or --max-length, raise --accumulate, or try "
            "--checkpointing, --recompute",
        ),
        ("evaluate", "out of memory in evaluation: lower --max-length, or try --dtype bfloat16, --quantize"),
    ],
)
def test_what_does_not_fit_in_memory(
    fedvb: Run, small: list[str], monkeypatch: pytest.MonkeyPatch, function: str, told: str
):
    def tight(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(fl_client.site, function, tight)
    shown = fedvb("simulate", *small, "--out", "run")
    assert (shown.code, shown.err) == (2, f"fedvb: {told}\n")
    options = {word.strip(":,") for word in told.split() if word.startswith("--")}
    assert options <= set(fedvb("simulate", "--help").out.split())


# --- What is printed ------------------------------------------------------------------------------


def test_help_fits_and_names_every_option(fedvb: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    bare = fedvb()
    assert (bare.code, bare.err) == (0, "")
    assert bare.out.split() == fedvb("--help").out.split()
    assert "Usage: fedvb " in bare.out
    for command in ([], ["simulate"], ["export"], ["plan"], ["compare"]):
        shown = fedvb(*command, "--help")
        assert (shown.code, shown.err) == (0, "")
        assert max(map(len, shown.out.splitlines())) <= WIDTH
    shown = fedvb("simulate", "--help")
    for option in ISSUE_2.split():
        assert f"--{option} " in shown.out


def test_no_help_loses_what_stands_in_brackets(fedvb: Run, monkeypatch: pytest.MonkeyPatch):
    """Help is markup: a name in brackets, as of an extra, would be taken for a style."""
    commands = [typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for text in (command.help, *(getattr(option, "help", None) for option in command.params)):
            assert Text.from_markup(text or "").plain == (text or "").replace("\\[", "[")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert "fed-vblora[text-scores]" in fedvb("simulate", "--help").out


def test_what_a_run_prints(fedvb: Run, small: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    shown = fedvb("simulate", *small, "--out", "runs/mine")
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert "rank 4, h 64, b 32, k 2: 120 rows in 13 layers" in shown.out
    assert "run      runs/mine" in lines
    rounds = [line.split() for line in lines if "/3 " in line]
    assert [row[0] for row in rounds] == ["0/3", "1/3", "2/3", "3/3"]
    for row, record in zip(rounds, read_history(Path("runs/mine")), strict=True):
        assert row[1] == ("-" if record["train_loss"] is None else f"{record['train_loss']:.4f}")
        assert row[2] == f"{record['score']:.4f}"
    header = next(line for line in lines if "train loss" in line)
    assert header.split() == ["round", "train", "loss", "accuracy", "up/client", "down/client", "seconds"]
    assert max(len(line) for line in lines if "/tiny-bert" not in line and "topics.csv" not in line) <= WIDTH
    assert "runs/mine/score.png" in shown.out


def test_runs_without_a_name_get_one_each(fedvb: Run, small: list[str], tmp_path: Path):
    for _ in range(2):
        assert fedvb("simulate", *small, "--rounds", "1", "--local-steps", "1").code == 0
    found = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert found == ["tiny-bert-topics.csv-vblora-seed0", "tiny-bert-topics.csv-vblora-seed0-2"]
