"""Runs that go on from an adapter of a file, over the whole wire."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fl_client.opening import open_site
from fl_server.handshake import Task, with_start
from simulations.export import export_run
from simulations.simulate import simulate
from tests.simulations.conftest import Run, read_history, read_summary, small_config
from vblora.errors import RunError, StartError
from vblora.files import load_state

pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[peft]'")


@pytest.fixture(scope="module")
def trained(tiny_bert: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows the topics, and its exports beside it."""
    out = tmp_path_factory.mktemp("runs") / "first"
    config = small_config(tiny_bert, topics, out, rounds=12, local_steps=15, batch_size=16, partition="iid")
    simulate(config | {"lr-head": 0.2, "lr-bank": 0.02})
    for form in ("full", "topk"):
        export_run(out, out / form, form=form)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("form", ["full", "topk", "."])
def test_a_run_goes_on_where_another_ended(
    fedvb: Run, small: list[str], trained: Path, tmp_path: Path, form: str
):
    """Its first score is the other's last, to what the rounding of one file costs; then it trains."""
    options = [*small, "--partition", "iid", "--start", str(trained / form), "--out", "run"]
    shown = fedvb("simulate", *options)
    assert (shown.code, shown.err) == (0, "")
    before, history = read_history(trained), read_history(tmp_path / "run")
    assert history[0]["eval_loss"] == pytest.approx(before[-1]["eval_loss"], abs=1e-3)
    assert history[-1]["digest"] != history[0]["digest"]
    summary = read_summary(tmp_path / "run")
    assert summary["score"]["start"] >= read_summary(trained)["score"]["start"] + 0.2

    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    for name in ("summary.json", "adapter/adapter.safetensors", "checkpoints/round-00003.safetensors"):
        (tmp_path / "stopped" / name).unlink()
    again = fedvb("simulate", "--resume", "--out", "stopped")
    assert (again.code, again.err) == (0, "")
    assert read_history(tmp_path / "stopped")[-1]["digest"] == history[-1]["digest"]
    assert fedvb("export", "run", "--out", "adapter").code == 0


def test_the_file_decides_and_what_asks_otherwise_is_refused(fedvb: Run, small: list[str], trained: Path):
    told = fedvb("simulate", *small, "--start", str(trained / "full"), "--rank", "2", "--out", "run")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "start: rank is 2, the adapter of --start has 4; leave it out" in told.err
    told = fedvb("simulate", *small, "--start", str(trained / "full"), "--adapter", "lora", "--out", "run")
    assert "adapter is lora, the adapter of --start has vblora" in told.err
    told = fedvb("simulate", *small, "--start", "nowhere", "--out", "run")
    assert told.err == (
        "fedvb: start nowhere: no adapter there; expected a folder with adapter_config.json and "
        "adapter_model.safetensors, or a finished run\n"
    )


def test_another_adapter_in_its_place_is_noticed(fedvb: Run, small: list[str], trained: Path, tmp_path: Path):
    shutil.copytree(trained / "full", tmp_path / "start")
    assert fedvb("simulate", *small, "--rounds", "1", "--start", "start", "--out", "run").code == 0
    shutil.copytree(trained / "topk", tmp_path / "start", dirs_exist_ok=True)
    open_site.cache_clear()  # as in another process
    told = fedvb("simulate", "--resume", "--out", "run", "--rounds", "2")
    assert told.code == 2
    assert "of another adapter than the clients hold: start: the checkpoint has " in told.err
    told = fedvb("export", "run", "--out", "adapter")
    assert told.code == 2
    assert "start start: it holds adapter " in told.err


def test_server_and_sites_must_go_on_from_the_same(
    trained: Path, fedvb: Run, small: list[str], tmp_path: Path
):
    assert (
        fedvb("simulate", *small, "--rounds", "1", "--start", str(trained / "full"), "--out", "run").code == 0
    )
    _, named = load_state(tmp_path / "run" / "adapter" / "adapter.safetensors")
    _, seeded = load_state(trained / "adapter" / "adapter.safetensors")

    def asked(blueprint, folder: str) -> Task:
        return with_start(Task(blueprint, "accuracy", True, None, None), folder)

    assert asked(seeded, "").blueprint is seeded
    held = asked(named, str(trained / "full")).blueprint
    assert held == named
    assert np.isfinite(held.start.held.dense["bank"]).all()
    for blueprint, folder, match in (
        (seeded, "x", "the server goes on from x, the clients from the seed; give each site --start"),
        (named, "", "the server from none; give it the same files with start=FOLDER"),
        (
            named,
            str(trained / "topk"),
            "it holds adapter .*, expected .*; give it the files that the run was",
        ),
    ):
        with pytest.raises((RunError, StartError), match=match):
            asked(blueprint, folder)
