"""Whole runs with parts that stay with clients: stopping, going on, clients that come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from simulations.export import client_state
from simulations.simulate import simulate
from tests.simulations.conftest import Run, read_history, read_summary, small_config
from vblora.files import load_state
from vblora.wire import initial

PERSONAL: dict[str, Any] = {"personal": "head,logits", "rounds": 4}


@pytest.fixture(scope="module")
def whole(tiny_bert: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with personal heads and logits that was left alone."""
    out = tmp_path_factory.mktemp("runs") / "personal"
    simulate(small_config(tiny_bert, topics, out, **PERSONAL))
    return out


def parts(run: Path) -> dict[str, bytes]:
    """What each client keeps: the newest of its parts."""
    files = sorted(run.glob("clients/*/personal/*/*.safetensors"))
    return {path.parent.name: path.read_bytes() for path in files}


def test_the_shared_state_keeps_the_seeds_parts(whole: Path):
    state, blueprint = load_state(whole / "adapter" / "adapter.safetensors")
    start = initial(blueprint)
    assert (state.dense["head"] == start.dense["head"]).all()
    assert state.topk is not None
    assert start.topk is not None
    assert state.topk.same_rows(start.topk).all()
    assert (state.dense["bank"] != start.dense["bank"]).any()
    for record in read_history(whole)[1:]:
        assert set(record["bytes"]["up_sections"]) == {"bank", "frame"}
    score = read_summary(whole)["score"]
    assert score["own_mean"] > score["final"], "the shared head is the seed's"
    assert set(score) >= {"own_mean", "own_std", "own_last3"}


@pytest.mark.parametrize("steps", [7, 10, 13])
def test_stopped_and_resumed_with_personal_parts(
    steps: int, whole: Path, tiny_bert: Path, topics: Path, tmp_path: Path
):
    """A round has 2 clients of 3 steps; at 10 one has kept its part of a round that comes again."""
    out = tmp_path / "run"
    taken = iter(range(steps))

    def stop(done: int, total: int) -> None:
        if next(taken, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(small_config(tiny_bert, topics, out, **PERSONAL), on_step=stop)
    simulate(small_config(tiny_bert, topics, out, resume=True, **PERSONAL))
    assert read_history(out) == read_history(whole)
    assert parts(out) == parts(whole)


def test_own_scores_change_nothing_else(finished: Path, tiny_bert: Path, topics: Path, tmp_path: Path):
    simulate(small_config(tiny_bert, topics, tmp_path / "run", own_scores=True))
    for found, expected in zip(read_history(tmp_path / "run"), read_history(finished), strict=True):
        assert sorted(found.pop("own")) == ["0", "1", "2", "3"]
        assert 0 <= found.pop("own_mean") <= 1
        assert found.pop("own_std") >= 0
        for record in (found, expected):
            record["bytes"].pop("evaluate")
        assert expected | found == expected


def test_late_clients_train_their_own_part_on_a_frozen_bank(tiny_bert: Path, topics: Path, tmp_path: Path):
    config = small_config(
        tiny_bert, topics, tmp_path / "run", personal="logits", rounds=6, freeze_bank=3, late_clients=2
    )
    simulate(config)
    records = read_history(tmp_path / "run")
    assert ["bank" in record["bytes"]["up_sections"] for record in records[1:]] == [True] * 3 + [False] * 3
    frozen = {
        load_state(path)[0].dense["bank"].tobytes()
        for path in (tmp_path / "run" / "checkpoints").glob("round-0000[3456].safetensors")
    }
    assert len(frozen) == 1
    kept = {
        name: sorted(f.stem for f in (tmp_path / "run").glob(f"clients/*/personal/{name}/*"))
        for name in "0123"
    }
    assert all(int(turn) > 3 for name in "23" for turn in kept[name])
    assert any(kept[name] for name in "23")


def test_a_clients_adapter_has_its_own_parts(fedvb: Run, whole: Path, tmp_path: Path):
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[peft]'")
    shown = fedvb("export", whole, "--out", "shared")
    assert shown.out.strip() == "vblora adapter (full) with the seed's head of round 4 -> shared"
    shown = fedvb("export", whole, "--out", "own", "--client", "1")
    assert shown.out.strip() == "vblora adapter (full) of client 1 of round 4 -> own"
    shared, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("shared", "own"))
    newest = max(whole.glob("clients/*/personal/1/*"))
    head = load_file(newest)["head"]
    names = {
        part: next(name for name in own if part in name) for part in ("classifier.weight", "vector_bank")
    }
    assert (own[names["classifier.weight"]].flatten() == head[: 3 * 32]).all()
    assert (shared[names["classifier.weight"]] != own[names["classifier.weight"]]).any()
    assert (shared[names["vector_bank"]] == own[names["vector_bank"]]).all()


def test_a_head_that_nobody_trained_answers_nothing(fedvb: Run, whole: Path, tmp_path: Path):
    told = "its clients keep their heads (personal is head,logits); choose one with --client, 0 to 3"
    for typed in (["predict", whole, "ball"], ["export", whole, "--format", "merged", "--out", "model"]):
        refused = fedvb(*typed)
        assert (refused.code, refused.out) == (2, "")
        assert told in refused.err
        assert fedvb(*typed, "--client", "1").code == 0
    assert "with the seed's head" in fedvb("export", whole, "--format", "lora", "--out", "lora").out


def test_a_client_that_has_not_trained_has_the_shared_adapter(tiny_bert: Path, topics: Path, tmp_path: Path):
    simulate(small_config(tiny_bert, topics, tmp_path / "run", personal="head", rounds=1))
    state, _ = load_state(tmp_path / "run" / "adapter" / "adapter.safetensors")
    found = [client_state(tmp_path / "run", state, client).digest == state.digest for client in range(4)]
    assert sorted(found) == [False, False, True, True]


def test_a_client_that_cannot_be_exported(fedvb: Run, whole: Path, finished: Path):
    assert "personal is none" in fedvb("export", finished, "--out", "own", "--client", "1").err
    assert "client is 4, expected 0 to 3" in fedvb("export", whole, "--out", "own", "--client", "4").err


def test_own_texts_need_the_column(fedvb: Run, tiny_bert: Path, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = "".join(f"ball {number},{'ab'[number % 2]},{number % 3}\n" for number in range(30))
    (folder / "train.csv").write_text("text,label,site\n" + rows)
    (folder / "test.csv").write_text("text,label\nball,a\nmoon,b\n")
    options = [
        *("--model", tiny_bert, "--data", folder, "--partition", "by:site", "--clients", "3"),
        *("--clients-per-round", "2", "--rounds", "1", "--local-steps", "1"),
    ]
    assert fedvb("simulate", *options, "--out", "without").code == 0
    refused = fedvb("simulate", *options, "--own-scores", "--out", "with")
    assert refused.code == 2
    assert "no client has held-out texts of its own" in refused.err


def test_a_part_that_the_adapter_lacks_is_told_at_the_start(fedvb: Run, small: list[str], tmp_path: Path):
    refused = fedvb("simulate", *small, "--adapter", "lora", "--personal", "logits", "--out", "run")
    assert (refused.code, (tmp_path / "run").exists()) == (2, False)
    assert "a lora adapter has no logits" in refused.err
    assert "expected none, head" in fedvb("simulate", *small, "--personal", "bank", "--out", "run").err
