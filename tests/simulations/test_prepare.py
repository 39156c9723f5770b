"""The data sets of the studies, from assets of a few lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fl_client.tables import load_corpus
from simulations.bench.prepare import (
    E2E,
    SHAKESPEARE,
    SST2,
    T0_ROWS,
    T0_TASKS,
    main,
    shakespeare_rows,
    split_groups,
    split_rows,
    split_sentences,
)

PLAY = "\n\n".join(
    ["First Citizen:\nSpeak.", "All:\nSpeak, speak.\nAgain: speak.", "First Citizen:\nYou are all resolved?"]
    + [f"ROMEO:\nLine {number}." for number in range(8)]
)

FILMS = ["a good film", "good film", 'a "bad film', '"bad film', "film"]


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder laid out as the assets."""
    for name in (T0_ROWS, T0_TASKS, SHAKESPEARE, E2E, SST2):
        (tmp_path / name).parent.mkdir(parents=True)
    rows = [
        {"task": task, "prompt": f"{task} {number}?\n", "completion": "Yes<|endoftext|>", "more": 1}
        for task in ("seen", "new", "newer")
        for number in range(10)
    ]
    with gzip.open(tmp_path / T0_ROWS, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / T0_TASKS).write_text(json.dumps({"tasks": ["new", "newer"]}))
    (tmp_path / SHAKESPEARE).write_text(PLAY + "\n")
    said = "".join(f'"name[Inn {n % 5}], area[{n}]","Inn {n % 5} is in {n}."\n' for n in range(20))
    (tmp_path / E2E).write_text(f"\ufeffmr,ref\n{said}", encoding="utf-8")
    rated = "".join(f"{text} \t{n % 2}\n" for n, text in enumerate(FILMS * 5))
    (tmp_path / SST2).write_text(f"sentence\tlabel\n{rated}")
    return tmp_path


def test_the_folders_load_with_their_groups(made_up: Path, tmp_path: Path):
    main([str(made_up), "--out", str(tmp_path / "out")])
    t0 = load_corpus(str(tmp_path / "out" / "t0"), "causal-lm", group_column="task")
    assert (len(t0.train), len(t0.test)) == (16, 4)
    assert set(t0.train.group or ()) == {"new", "newer"}
    assert {text.split()[0] for text in t0.train.text + t0.test.text} == {"new", "newer"}
    plays = load_corpus(str(tmp_path / "out" / "shakespeare"), "causal-lm", group_column="speaker")
    assert plays.train.completion is None
    assert (len(plays.train), len(plays.test)) == (9, 2)


def test_restaurants_that_are_held_out_are_in_no_training_row(made_up: Path, tmp_path: Path):
    main([str(made_up), "--out", str(tmp_path / "out")])
    corpus = load_corpus(str(tmp_path / "out" / "e2e-names"), "causal-lm", group_column="name")
    assert (len(corpus.train), len(corpus.test)) == (16, 4)
    assert not set(corpus.train.group or ()) & set(corpus.test.group or ())


def test_phrases_go_with_their_sentences(made_up: Path, tmp_path: Path):
    main([str(made_up), "--out", str(tmp_path / "out")])
    corpus = load_corpus(str(tmp_path / "out" / "sst2-sentences"), "classification")
    assert corpus.labels == ("0", "1")
    assert (len(corpus.train), len(corpus.test)) == (15, 5)
    rows = [{"sentence": text, "label": "1"} for text in FILMS]
    train, test = split_sentences(rows)
    held = test[0]["sentence"]
    kept = next(text for text in ("a good film", 'a "bad film') if text != held)
    assert [row["sentence"] for row in train] == [text for text in FILMS if text in kept]
    assert len(test) == 1
    assert len(train) == 3


def test_groups_are_held_out_until_a_fifth_of_the_rows_is():
    rows = [{"name": name} for name in "aabbccddddddddddddddd"]
    train, test = split_groups(rows, "name")
    assert sorted(train + test, key=str) == sorted(rows, key=str)
    assert len(test) >= 5
    assert (train, test) == split_groups(rows, "name")


def test_a_speech_goes_without_its_speaker_and_small_parts_are_left_out(made_up: Path):
    rows = shakespeare_rows(made_up, speakers=2)
    assert {row["speaker"] for row in rows} == {"ROMEO", "First Citizen"}
    assert rows[1] == {"speaker": "First Citizen", "text": "You are all resolved?"}


def test_rows_are_split_once_and_in_order():
    rows = [{"n": str(number)} for number in range(50)]
    train, test = split_rows(rows)
    assert len(test) == 10
    assert sorted(train + test, key=lambda row: int(row["n"])) == rows
    assert [int(row["n"]) for row in test] == sorted(int(row["n"]) for row in test)
    assert (train, test) == split_rows(rows)
    assert test != split_rows(rows, seed=1)[1]
