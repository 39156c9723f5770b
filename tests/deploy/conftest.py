"""Folders and texts of a federation."""

from __future__ import annotations

import csv
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulations.conftest import COMMON, TOPICS, tiny_bert

__all__ = ["tiny_bert", "write_texts"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a short path: the addresses of sockets are short."""
    made = Path(tempfile.mkdtemp(prefix="fedvb-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def write_texts(path: Path, labels: list[str], rows: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            label = draw.choice(labels)
            words = draw.choices(TOPICS[label].split(), k=4) + draw.choices(COMMON.split(), k=4)
            writer.writerow([" ".join(words), label])
    return path
