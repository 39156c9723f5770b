"""A tiny encoder, a small csv and the command line in this process: a whole run takes a second."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fl_server.fakes import read_history as read_history  # for all tests of whole runs

TOPICS = {
    "food": "apple bread cheese soup salt rice fish tea plate cook spoon sweet",
    "space": "star moon orbit rocket comet planet dust light probe launch ring crater",
    "sport": "ball goal team race swim coach score match jump field medal win",
}
COMMON = "the a and of in with some one then was very our"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SITES = 7

Run = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a call of `fedvb` left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers of width 32 with random weights, and its WordPiece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    folder.mkdir()
    words = [*SPECIAL, *" ".join([COMMON, *TOPICS.values()]).split()]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,  # at 0.02 so small a model tells hardly any texts apart
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of 240 texts in three labels, from seven sites."""
    path = tmp_path_factory.mktemp("data") / "topics.csv"
    draw = random.Random(0)
    rows = []
    for number in range(240):
        label = draw.choice(list(TOPICS))
        words = draw.choices(TOPICS[label].split(), k=4) + draw.choices(COMMON.split(), k=draw.randint(2, 8))
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label, "site": f"site {number % SITES}"})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "site"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def small(tiny_bert: Path, topics: Path) -> list[str]:
    """Options of a run of three rounds that takes a second."""
    return [
        *("--model", str(tiny_bert), "--data", str(topics)),
        *("--clients", "4", "--clients-per-round", "2", "--rounds", "3"),
        *("--local-steps", "3", "--batch-size", "4"),
    ]


@pytest.fixture
def fedvb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the command line in this process, in an empty folder."""
    from simulations.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedvb", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def finished(tiny_bert: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `small`, finished. Copy it before changing it."""
    from simulations.simulate import simulate

    out = tmp_path_factory.mktemp("runs") / "finished"
    simulate(small_config(tiny_bert, topics, out))
    return out


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def small_config(model: Path, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The config that `small` makes; changes are named with underscores."""
    from simulations.config import default_config

    given: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "clients": 4,
        "clients-per-round": 2,
        "rounds": 3,
        "local-steps": 3,
        "batch-size": 4,
        "out": str(out),
    }
    return {**default_config(), **given, **{name.replace("_", "-"): to for name, to in changes.items()}}


def read_summary(run: Path) -> dict[str, Any]:
    """The summary of a run."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary
