"""The bench of a site with a small GPU, at a shape that a CPU can train."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
SMALL = ["--length", "16", "--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(SHAPES["llama-2-7b"], sizes=TINY, num_vectors=32, vector_length=32)
    monkeypatch.setitem(SHAPES, "llama-2-7b", tiny)


def test_a_round_in_each_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "rows.json"
    written = []
    monkeypatch.setattr(trainer7b, "write_atomic", lambda path, text: written.append(path.write_text(text)))
    trainer7b.main([*SMALL, "--json", str(target)])
    assert len(written) == len(trainer7b.WAYS), "after every way: the next may end badly"
    rows = json.loads(target.read_text())["rows"]
    assert [(row["checkpointing"], row["accumulate"]) for row in rows] == list(trainer7b.WAYS)
    assert all(row["error"] == "" and row["sent"] > 0 and row["seconds"] > 0 for row in rows)
    assert rows[0]["predicted"] > rows[1]["predicted"] > 0
    assert "without the socket" not in capsys.readouterr().out, "it went through a trainer"


def test_older_libraries_than_the_generated_code_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from google.protobuf.runtime_version import VersionError

    def refused(*_: object) -> None:
        raise VersionError("older than the gencode")

    monkeypatch.setattr("google.protobuf.runtime_version.ValidateProtobufRuntimeVersion", refused)
    for name in [name for name in sys.modules if name.startswith(("fl_client.trainer", "fl_client.thin"))]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["fl_client"], name.partition(".")[2], raising=False)
    trainer7b.main([*SMALL, "--layers", "1"])
    told = capsys.readouterr().out
    assert told.count("without the socket: VersionError: older than the gencode") == len(trainer7b.WAYS)
    assert told.count('"error": ""') == len(trainer7b.WAYS)


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(trainer7b, "build_in_few_bits", full)
    trainer7b.main(SMALL)
    assert capsys.readouterr().out.count("CUDA out of memory. Tried to allocate 2 GiB") >= len(trainer7b.WAYS)


def test_it_needs_no_data_libraries_and_no_flower():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['flwr', 'datasets', 'flwr_datasets', 'typer'])); "
        "import simulations.bench.trainer7b, fl_client.trainer"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
