"""Anything may arrive. What a fuzzer has found to reach new code is tried every time, and it looks again."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.vblora.fuzz import CORPUS, run_one, seeds
from tests.vblora.make_golden import GOLDEN_BLOBS

SESSIONS, SECONDS = 6, 100
TOO_LONG = 10  # seconds of one input


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", GOLDEN_BLOBS)
def test_a_sound_blob_is_accepted(name: str):
    told = "trained from version 5" if name == "update" else "accepted"
    assert told in run_one(seeds()[name])


def test_the_corpus():
    """Nothing but our own errors, in four times the memory of a state; many of them."""
    found = {re.sub(r"[0-9-]+|[0-9a-f]{8,}", "#", run_one(path.read_bytes())) for path in CORPUS.iterdir()}
    assert "accepted" in found
    assert len(found) > 30


@pytest.mark.slow
@pytest.mark.timeout(SESSIONS * (SECONDS + 60))
def test_ten_minutes_of_fuzzing(tmp_path: Path):
    """In sessions: atheris keeps each array that a comparison gave until its process ends."""
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has no wheel for this Python or machine")
    options = [f"-max_total_time={SECONDS}", f"-timeout={TOO_LONG}", "-rss_limit_mb=2048", "-max_len=8192"]
    (found := tmp_path / "found").mkdir()
    command = [sys.executable, "-m", "tests.vblora.run_fuzz", found, CORPUS, *options]
    for seed in range(1, SESSIONS + 1):
        done = subprocess.run(
            [*command, f"-seed={seed}"],
            cwd=ROOT,
            env={"PATH": "", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        print(done.stderr[-3000:])
        assert done.returncode == 0, "see the input that is named above; give it a regression test"
        assert re.search(r"Done [0-9]+ runs", done.stderr)
