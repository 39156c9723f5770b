"""Files that are whole or absent, and states that come back from them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from safetensors.torch import save_file as torch_save

from tests.vblora.make_golden import BLUEPRINT, make_state
from vblora.errors import RunError
from vblora.files import alone, load_state, save_state, write_atomic
from vblora.spec import LoRASpec
from vblora.state import TopK, initial_state

# --- Atomic writes -------------------------------------------------------------------


def test_a_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomic(path, "old ä")
    assert path.read_text(encoding="utf-8") == "old ä"
    write_atomic(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert [entry.name for entry in path.parent.iterdir()] == ["c.txt"]


def test_a_written_file_has_ordinary_permissions(tmp_path):
    write_atomic(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "state"
    write_atomic(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise error

    open_before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    assert len(os.listdir("/dev/fd")) == open_before


def test_a_folder_in_the_way_is_an_error_that_leaves_nothing(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(OSError, match="state"):
        write_atomic(tmp_path / "state", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


# --- States --------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path / "state.safetensors", make_state(), BLUEPRINT)
    return tmp_path / "state.safetensors"


def test_a_state_comes_back(saved):
    state, blueprint = load_state(saved)
    assert blueprint == BLUEPRINT
    assert state.version == 5
    assert state.digest == make_state().digest
    assert state.topk.positions.dtype == np.int32


def test_a_state_without_a_selection_comes_back(tmp_path):
    blueprint = replace(BLUEPRINT, spec=LoRASpec())
    save_state(tmp_path / "state", initial_state(blueprint), blueprint)
    state, found = load_state(tmp_path / "state")
    assert found == blueprint
    assert state.topk is None
    assert state.digest == initial_state(blueprint).digest


def test_arrays_may_lie_in_memory_as_they_like(tmp_path, saved):
    state = make_state()
    dense = {name: np.asfortranarray(array) for name, array in state.dense.items()}
    topk = TopK(np.asfortranarray(state.topk.positions), state.topk.gaps[::-1][::-1])
    save_state(tmp_path / "other", replace(state, dense=dense, topk=topk), BLUEPRINT)
    assert load_state(tmp_path / "other")[0].digest == state.digest


def test_equal_states_are_equal_files(tmp_path, saved):
    for _ in range(10):  # safetensors draws an order of the metadata each time
        save_state(tmp_path / "again", make_state(), BLUEPRINT)
        assert (tmp_path / "again").read_bytes() == saved.read_bytes()
    (length,) = struct.unpack("<Q", saved.read_bytes()[:8])
    assert length % 8 == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nothing\.safetensors: not a readable state file"):
        load_state(tmp_path / "nothing.safetensors")


def test_a_part_of_a_file_is_refused(saved):
    content = saved.read_bytes()
    for length in range(0, len(content), 7):
        saved.write_bytes(content[:length])
        with pytest.raises(RunError):
            load_state(saved)


def test_a_flipped_bit_is_refused(saved):
    """In the blueprint's text too, such as a digit of the seed or a letter of a label."""
    content = saved.read_bytes()
    expected = make_state().digest, BLUEPRINT
    for byte in range(0, len(content), 2):
        damaged = bytearray(content)
        damaged[byte] ^= 1 << byte // 2 % 7
        saved.write_bytes(bytes(damaged))
        try:
            state, blueprint = load_state(saved)
        except RunError:
            continue
        # JSON lets some bits flip without a change of meaning: a space for another, "\u00e9" for "\u00E9".
        assert (state.digest, blueprint) == expected, byte


def _rewritten(path: Path, tensors: dict | None = None, **metadata: str) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    held = json.loads(content[8 : 8 + length])["__metadata__"]
    path.write_bytes(save({**load(content), **(tensors or {})}, {**held, **metadata}))


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "fedvb-state-9"},
        {"version": "6"},
        {"version": "-1"},
        {"version": "99999999999999999999999"},
        {"version": "five"},
        {"digest": "00" * 16},
        {"fingerprint": "00" * 16},
        {"blueprint": "{}"},
        {"blueprint": BLUEPRINT.to_json().replace('"rank":2', '"rank":0')},
        {"blueprint": BLUEPRINT.to_json().replace('"seed":11', '"seed":12')},
    ],
)
def test_wrong_metadata_is_refused(saved, metadata):
    _rewritten(saved, **metadata)
    with pytest.raises(RunError, match=r"state\.safetensors: "):
        load_state(saved)


@pytest.mark.parametrize(
    "tensors",
    [
        {"bank": np.zeros((6, 4), np.float32)},
        {"extra": np.zeros(1, np.float32)},
        {"gaps": np.zeros((3, 1), np.float32)},
        {"bank": make_state().dense["bank"].astype(np.float64)},
        {"positions": make_state().topk.positions.astype(np.int64)},
    ],
)
def test_wrong_tensors_are_refused(saved, tensors):
    _rewritten(saved, tensors)
    with pytest.raises(RunError, match=r"state\.safetensors: "):
        load_state(saved)


def test_numbers_that_numpy_does_not_know_are_refused(saved):
    torch_save({"bank": torch.zeros(6, 4, dtype=torch.bfloat16)}, saved)
    with pytest.raises(RunError, match=r"state\.safetensors: "):
        load_state(saved)


def test_a_state_of_another_blueprint_is_refused(tmp_path):
    """Digest and fingerprint fit each; the two do not fit together."""
    save_state(tmp_path / "state", make_state(), replace(BLUEPRINT, head=()))
    with pytest.raises(RunError, match="not a state of its own adapter: sections are"):
        load_state(tmp_path / "state")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "other").write_bytes(save({"x": np.zeros(3, np.float32)}))
    with pytest.raises(RunError, match="format is None, expected 'fedvb-state-1'"):
        load_state(tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(RunError, match="not a readable state file"):
        load_state(tmp_path / "text")
    with pytest.raises(RunError, match="not a readable state file"):
        load_state(tmp_path)


def test_one_holds_a_lock_and_leaves_nothing(tmp_path: Path):
    file = tmp_path / "a" / "b" / "lock"
    with alone(file, "here", "test", "wait"):
        assert file.read_text() == str(os.getpid())
        with (
            pytest.raises(RunError, match=rf"here: in use by another test \(process {os.getpid()}\); wait"),
            alone(file, "here", "test", "wait"),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(RunError, match=r"here: cannot be written to \(File exists\); wait"),
        alone(Path("/dev/null/lock"), "here", "test", "wait"),
    ):
        pass


def test_a_lock_that_is_removed_while_one_waits_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, flock = tmp_path / "lock", fcntl.flock
    held = []

    def removed_meanwhile(opened: Any, how: int) -> None:
        flock(opened, how)
        if not held:
            file.unlink()
        held.append(opened)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with alone(file, "here", "test", "wait"):
        assert file.read_text() == str(os.getpid())
    assert len(held) == 2


def test_without_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(opened: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with alone(tmp_path / "lock", "here", "test", "wait"):
        pass
