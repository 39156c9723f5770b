"""Data sets of the studies that are not one file yet, as folders for `--data`.

python -m simulations.bench.prepare ../shared/assets        # writes runs/data/t0, shakespeare, ...

E2E and SST-2 need nothing: `--data ../shared/assets/data/e2e` trains on devset.csv, is scored on
testset_w_refs.csv, most of whose restaurants are others. e2e-names and sst2-sentences are for choosing
settings: training rows alone, with some restaurants, and some sentences with all phrases that are of no
other, held out. Rows drawn at random would be of restaurants and of sentences that are trained on.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vblora.files import write_atomic

__all__ = [
    "e2e_rows",
    "main",
    "shakespeare_rows",
    "split_groups",
    "split_rows",
    "split_sentences",
    "sst2_rows",
    "t0_rows",
]

Row = dict[str, str]

T0_ROWS = "data/instruct/t0_train_50k.jsonl.gz"
T0_TASKS = "models/t0-llama-28m/heldout_tasks.json"
SHAKESPEARE = "data/text/tinyshakespeare.txt"
E2E = "data/e2e/devset.csv"
SST2 = "data/sst2/train.tsv"
SPEAKERS = 20  # those with the most text, some 13,000 characters or more each
HELD_OUT = 0.2  # of the rows
SENTENCES = 0.39  # of those of SST-2 are held out, about as many as dev and test have
SEED = 0


def t0_rows(assets: Path) -> list[Row]:
    """Rows (task, prompt, completion) of the tasks that t0-llama-28m has never seen."""
    tasks = set(json.loads((assets / T0_TASKS).read_text())["tasks"])
    with gzip.open(assets / T0_ROWS, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    kept = [row for row in rows if row["task"] in tasks]
    return [{key: row[key] for key in ("task", "prompt", "completion")} for row in kept]


def shakespeare_rows(assets: Path, speakers: int = SPEAKERS) -> list[Row]:
    """Rows (speaker, text), a speech each without the line that names who speaks."""
    speeches = (assets / SHAKESPEARE).read_text(encoding="utf-8").split("\n\n")
    parted = [speech.strip("\n").partition(":\n") for speech in speeches]
    rows = [{"speaker": name, "text": text} for name, colon, text in parted if colon and text.strip()]
    sizes = Counter[str]()
    for row in rows:
        sizes[row["speaker"]] += len(row["text"])
    chosen = {name for name, _ in sizes.most_common(speakers)}
    return [row for row in rows if row["speaker"] in chosen]


def e2e_rows(assets: Path) -> list[Row]:
    """Rows (name, prompt, completion): a restaurant's, a meaning representation, a sentence that says it."""
    with (assets / E2E).open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [
        {
            "name": row["mr"].partition("]")[0].removeprefix("name["),
            "prompt": row["mr"],
            "completion": row["ref"],
        }
        for row in rows
    ]


def sst2_rows(assets: Path) -> list[Row]:
    """Rows (sentence, label): 6,885 sentences and phrases of them, words parted by one space."""
    with (assets / SST2).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [{"sentence": " ".join(row["sentence"].split()), "label": row["label"]} for row in rows]


def split_sentences(
    rows: Sequence[Row], share: float = SENTENCES, seed: int = SEED
) -> tuple[list[Row], list[Row]]:
    """Training rows, and whole sentences (texts that are part of no other text) that none of them is part of.

    A phrase that a held sentence shares with another one is trained on, as those of SST-2's own test set are.
    """
    texts = {row["sentence"] for row in rows}
    parts = {part for text in texts for part in _parts(text) if part != text}
    whole = sorted(texts - parts)
    drawn = np.random.default_rng(seed).permutation(len(whole)).tolist()
    held = round(share * len(whole))
    test = {whole[number] for number in drawn[:held]}
    train = {part for number in drawn[held:] for part in _parts(whole[number])}
    return [row for row in rows if row["sentence"] in train], [row for row in rows if row["sentence"] in test]


def _parts(text: str) -> Iterator[str]:
    """All runs of words, the text itself among them."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield " ".join(words[start:end])


def split_groups(rows: Sequence[Row], key: str, seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows that share no group: groups are drawn until a fifth of the rows is held."""
    sizes = Counter(row[key] for row in rows)
    names = sorted(sizes)
    held: set[str] = set()
    for number in np.random.default_rng(seed).permutation(len(names)).tolist():
        if sum(sizes[name] for name in held) < HELD_OUT * len(rows):
            held.add(names[number])
    return [row for row in rows if row[key] not in held], [row for row in rows if row[key] in held]


def split_rows(rows: Sequence[Row], seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, drawn by row, each in its old order."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[: round(HELD_OUT * len(rows))]
    held = set(drawn.tolist())
    return (
        [row for number, row in enumerate(rows) if number not in held],
        [row for number, row in enumerate(rows) if number in held],
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the folders, each with train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("assets", type=Path, help="folder with data/ and models/")
    parser.add_argument("--out", type=Path, default=Path("runs/data"))
    given = parser.parse_args(arguments)
    splits = {
        "t0": split_rows(t0_rows(given.assets)),
        "shakespeare": split_rows(shakespeare_rows(given.assets)),
        "e2e-names": split_groups(e2e_rows(given.assets), "name"),
        "sst2-sentences": split_sentences(sst2_rows(given.assets)),
    }
    for name, (train, test) in splits.items():
        _write(given.out / name / "train.jsonl", train)
        _write(given.out / name / "test.jsonl", test)
        print(f"{given.out / name}: {len(train):,} training rows, {len(test):,} held out")


def _write(path: Path, rows: Iterable[Row]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
