"""The bench of a site with a small GPU, at a shape that a CPU can train."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from simulations.bench import trainer7b
from simulations.bench.shapes import SHAPES
from tests.conftest import ROOT

pytest.importorskip("bitsandbytes")

TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def test_a_round_in_each_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny = replace(SHAPES["llama-2-7b"], sizes=TINY, num_vectors=32, vector_length=32)
    monkeypatch.setitem(SHAPES, "llama-2-7b", tiny)
    monkeypatch.setattr(trainer7b, "STEPS", 2)
    target = tmp_path / "rows.json"
    trainer7b.main(["--length", "16", "--device", "cpu", "--json", str(target)])
    rows = json.loads(target.read_text())["rows"]
    assert [(row["checkpointing"], row["accumulate"]) for row in rows] == list(trainer7b.WAYS)
    assert all(row["error"] == "" and row["sent"] > 0 and row["seconds"] > 0 for row in rows)
    assert rows[0]["predicted"] > rows[1]["predicted"] > 0
    assert "without the socket" not in capsys.readouterr().out, "it went through a trainer"


def test_it_needs_no_data_libraries_and_no_flower():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['flwr', 'datasets', 'flwr_datasets', 'typer'])); "
        "import simulations.bench.trainer7b, fl_client.trainer"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
