"""What clients remember, in the process or on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fl_client.memory import OLDEST, STATES, Memory
from tests.vblora.make_golden import BLUEPRINT, make_state
from vblora.errors import RunError
from vblora.state import State


def numbered(version: int) -> State:
    return replace(make_state(), version=version)


@pytest.fixture(params=["process", "disk"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    memory = Memory(tmp_path if request.param == "disk" else None)
    memory.open("run1")
    return memory


def test_the_newest_states_are_held(memory: Memory):
    states = [numbered(version) for version in range(1, STATES + 4)]
    for state in states:
        memory.keep_state(state, BLUEPRINT)
    assert [memory.state(state.digest) is not None for state in states] == [False] * 3 + [True] * STATES
    assert memory.state(bytes(16)) is None


def test_another_run_knows_nothing_of_it(memory: Memory):
    memory.keep_state(numbered(1), BLUEPRINT)
    memory.keep_waiting(3, 1, {"bank": np.ones(2, np.float32)})
    memory.open("run2")
    assert memory.state(numbered(1).digest) is None
    assert memory.waiting(3, 5) == {}


def test_what_waits_is_of_the_last_turn_before_a_version(memory: Memory):
    for version in (2, 4, 5):
        memory.keep_waiting(3, version, {"bank": np.full(2, version, np.float32)})
    assert memory.waiting(3, 9)["bank"][0] == 5
    assert memory.waiting(3, 4)["bank"][0] == 4, "round 5 is trained again after a resume"
    assert memory.waiting(3, 3) == {}, "only the last turns are kept"
    assert memory.waiting(2, 9) == {}
    assert memory.waiting(3, 5 + OLDEST)["bank"][0] == 5
    assert memory.waiting(3, 6 + OLDEST) == {}, "too old to be worth sending"


def test_on_disk_it_outlives_the_process(tmp_path: Path):
    memory = Memory(tmp_path)
    memory.open("run1")
    memory.keep_state(numbered(1), BLUEPRINT)
    memory.keep_waiting(3, 1, {"bank": np.ones(2, np.float32)})
    later = Memory(tmp_path)
    later.open("run1")
    found = later.state(numbered(1).digest)
    assert found is not None
    assert found.digest == numbered(1).digest
    assert later.waiting(3, 1)["bank"].tolist() == [1, 1]


def test_damaged_files_are_as_good_as_none(tmp_path: Path):
    memory = Memory(tmp_path)
    memory.open("run1")
    memory.keep_state(numbered(1), BLUEPRINT)
    memory.keep_waiting(3, 1, {"bank": np.ones(2, np.float32)})
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    later = Memory(tmp_path)
    later.open("run1")
    assert later.state(numbered(1).digest) is None
    assert later.waiting(3, 1) == {}


@pytest.mark.parametrize("name", ["../up", "a/b", "A", "x" * 33, "."])
def test_a_run_cannot_lead_out_of_the_folder(tmp_path: Path, name: str):
    with pytest.raises(RunError, match="expected letters a to z and digits"):
        Memory(tmp_path).open(name)
