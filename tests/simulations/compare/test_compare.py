"""`fedvb compare` as it is typed: a whole comparison, going on, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.simulations.conftest import Run, read_summary

FILES = {
    *("comparison.json", "comparison.md", "report.html", "runs"),
    *("score-by-round.png", "score-by-bytes.png", "bytes-by-part.png"),
}


@pytest.fixture
def short(tiny_bert: Path, topics: Path) -> list[str]:
    """Options of runs of two rounds."""
    return [
        *("--model", str(tiny_bert), "--data", str(topics), "--clients", "4", "--clients-per-round", "2"),
        *("--rounds", "2", "--local-steps", "2", "--batch-size", "4", "--workers", "1"),
    ]


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def times(out: Path) -> dict[str, int]:
    """When each run ended, by its place."""
    return {str(path.parent.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("summary.json")}


def test_a_comparison_is_trained_once_and_grows(fedvb: Run, short: list[str], tmp_path: Path):
    out = tmp_path / "cmp"
    common = [*short, "--no-label-mix", "--own-scores", "--out", "cmp"]
    typed = ["compare", *common, "--adapters", "vblora,lora:2"]
    first = fedvb(*typed, "--seeds", "1")
    assert (first.code, first.err) == (0, "")
    assert {path.name for path in out.iterdir()} == FILES
    for told in (
        "compare  lora:2 float32, lora:2, vblora; seed 0",
        "rates    as they are (--tune 1 would",
        "work     3 runs of 2 rounds; ",
        "came to 98% of lora:2 float32's accuracy with the fewest bytes",
        "One seed:",
        "report: cmp/report.html",
    ):
        assert told in first.out
    found = content(out)
    assert list(found["adapters"]) == ["lora:2 float32", "lora:2", "vblora"]
    assert found["protocol"]["command"] == f"fedvb {' '.join([*typed, '--seeds', '1'])}"

    # What is told of a run is what it left.
    run = found["adapters"]["vblora"]["runs"][0]
    summary = read_summary(out / "runs" / "vblora" / "lr-bank-0.008" / "seed-0")
    assert run["last3"] == summary["score"]["last3"]
    assert run["total"] == summary["bytes"]["up_total"] + summary["bytes"]["down_total"]
    assert run["memory"] > 50e6
    assert run["more"] == {
        "own, last three": summary["score"]["own_last3"],
        "spread among clients": summary["score"]["own_std"],
    }
    sent = {name: found["adapters"][name]["runs"][0]["up"] for name in found["adapters"]}
    assert sent["lora:2 float32"] > 4 * sent["lora:2"] > sent["vblora"]

    # The same again trains nothing; another adapter trains that alone.
    before, report = times(out), (out / "report.html").read_bytes()
    again = fedvb(*typed, "--seeds", "1")
    assert (again.code, again.err) == (0, "")
    assert "work " not in again.out
    assert (out / "report.html").read_bytes() == report
    more = fedvb("compare", *common, "--adapters", "vblora,lora:2,bank-only", "--seeds", "1")
    assert (more.code, more.err) == (0, "")
    assert "work     1 runs of 2 rounds, 3 of 4 are there; 1 at a time" in more.out
    assert before.items() < times(out).items()

    # Other options are another comparison.
    refused = fedvb(*typed, "--seeds", "1", "--rounds", "3", "--topk", "1")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "topk is 1, the run has 2; rounds is 3, the run has 2; compare with what it" in refused.err
    assert before.items() < times(out).items()


def test_rates_are_chosen_on_other_texts(fedvb: Run, short: list[str], tmp_path: Path):
    """The grid of one adapter, of which one rate is kept, and the final run at it."""
    typed = ["--adapters", "lora:2", "--wire", "lossless", "--seeds", "1", "--tune", "1", "--out", "cmp"]
    shown = fedvb("compare", *short, *typed)
    assert (shown.code, shown.err) == (0, "")
    assert "rates    3 runs try 3 of each on a part of the training texts" in shown.out
    trials = content(tmp_path / "cmp")["protocol"]["trials"]["lora:2"]
    assert [trial["rate"] for trial in trials] == [0.002, 0.004, 0.008]
    kept = [trial for trial in trials if trial["chosen"]]
    assert len(kept) == 1
    assert kept[0]["scores"] == [max(trial["scores"][0] for trial in trials)]
    tried = times(tmp_path / "cmp")
    assert sorted(tried) == sorted(
        [f"runs/lora-2/lr-rows-{kept[0]['rate']:g}/seed-0"]
        + [f"tuning/lora-2/lr-rows-{trial['rate']:g}/seed-1000" for trial in trials]
    )
    config = json.loads((tmp_path / "cmp/tuning/lora-2/lr-rows-0.002/seed-1000/config.json").read_text())
    assert (config["eval-split"], config["seed"]) == ("train", 1000)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--adapters dora", "kind is 'dora', expected one of vblora, lora"),
        ("--adapters vblora", "no LoRA to compare with; name one, such as lora:8"),
        ("--adapters lora:8,lora:8", "'lora:8' is named twice"),
        ("--seeds 0", "seeds is 0, expected at least 1"),
        ("--rounds 0", "rounds is 0"),
        ("--seed 2000", "seeds from 1000 on are those of the tuning"),
        ("--tune -1", "'--tune': -1 is not in the range x>=0"),
        ("--clients-per-round 9", "clients-per-round is 9 but there are 4 clients"),
        ("--resume", "No such option '--resume'"),
        ("--adapter lora", "No such option"),
        ("--start adapter", "No such option"),
        ("--personal head", "No such option"),
        ("--freeze-bank 1", "No such option"),
        ("--out file", "file is a file, expected a directory"),
    ],
)
def test_bad_options_of_a_comparison(fedvb: Run, short: list[str], tmp_path: Path, typed: str, told: str):
    (tmp_path / "file").write_text("mine")
    shown = fedvb("compare", *short, *typed.split())
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("fedvb: ")
    assert shown.err.count("\n") == 1
    assert told in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--data nowhere.csv", "nowhere.csv: no such file or folder"),
        ("--target-modules nope", "'nope' fits no linear layer"),
        ("--adapters lora:2,vblora:1", "topk (k) is 2, the bank has num-vectors (h) 1; choose k <= h"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(
    fedvb: Run, short: list[str], tmp_path: Path, typed: str, told: str
):
    shown = fedvb("compare", *short, "--out", "cmp", *typed.split())
    assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert told in shown.err
    assert not (tmp_path / "cmp").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_it_goes_on(how: signal.Signals, short: list[str], tmp_path: Path):
    """After Ctrl-C in a terminal or a kill: no process is left, and the end is the same to the last digit."""
    typed = [sys.executable, "-m", "simulations.cli", "compare", *short, "--rounds", "30", "--seeds", "1"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen(
        [*typed, "--out", str(stopped)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while sum(path.read_text().count("\n") for path in stopped.rglob("history.jsonl")) < 12:
        assert process.poll() is None
        time.sleep(0.1)
    if how is signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    out, _ = process.communicate(timeout=60)
    assert "Traceback" not in out
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "what is finished in" in out
        assert out.endswith("the same command\n")
    end = time.monotonic() + 60
    while _running(process.pid):
        assert time.monotonic() < end, "a process was left"
        time.sleep(0.5)
    for folder in (stopped, whole):
        subprocess.run([*typed, "--out", str(folder)], check=True, capture_output=True)
    for name, adapter in content(whole)["adapters"].items():
        gone_on = content(stopped)["adapters"][name]["runs"][0]
        for key in ("curve", "sections", "last3", "total"):
            assert gone_on[key] == adapter["runs"][0][key]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "seconds"), [(3, 1.5), (4, 0.2)], ids=["importing", "looking ahead"])
def test_stopped_early(processes: int, seconds: float, short: list[str], tmp_path: Path):
    """Ctrl-C while a server imports the libraries, and while the probe is at work: a line, no process left.

    There are this process, the tracker of resources, the server, and the probe.
    """
    typed = [sys.executable, "-m", "simulations.cli", "compare", *short, "--seeds", "1", "--out", "cmp"]
    process = subprocess.Popen(
        typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while len(_processes(process.pid)) < processes:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == "stopped: what is finished in cmp is kept; go on with the same command\n"
    assert process.returncode == 130
    end = time.monotonic() + 60
    while _running(process.pid):
        assert time.monotonic() < end, "a process was left"
        time.sleep(0.5)


def _processes(session: int) -> list[str]:
    """States of the processes of a session."""
    found = subprocess.run(
        ["ps", "-s", str(session), "-o", "stat="], capture_output=True, text=True, check=False
    )
    return found.stdout.split()


def _running(session: int) -> bool:
    """Whether any process of a session is left."""
    return any(not state.startswith("Z") for state in _processes(session))
