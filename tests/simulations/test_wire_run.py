"""The wire in whole runs: its options, its bytes, its memories, and clients that hold something wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client import serve
from fl_client.memory import Memory
from fl_client.questions import Answer, Question
from fl_client.serve import answer
from fl_server.broadcast import Broadcast
from fl_server.rounds import run_rounds
from fl_server.settings import ServerSettings
from simulations.direct import DirectExchange
from tests.fl_client.sites import make_site
from tests.simulations.conftest import Run, read_history, read_summary
from vblora.files import load_state
from vblora.rounding import WIRES, WireSettings

CLIENTS = 4
Tamper = Callable[[int, Memory, Path], Memory]


class Sites:
    """All clients of a run in one process, their memory on disk; who tampers does so before a round."""

    def __init__(self, folder: Path, wire: WireSettings, tamper: Tamper | None = None) -> None:
        site = make_site(CLIENTS)
        settings = replace(site.settings, wire=wire)
        self.site = replace(site, settings=settings, memory=Memory(folder))
        self._folder, self._tamper, self._round = folder, tamper, 0

    def __call__(self, questions: Sequence[Question]) -> Iterator[Answer]:
        number = int(questions[0].config.get("round", 0)) if questions else 0
        if questions and questions[0].kind == "train" and number > self._round:
            self._round = number
            if self._tamper is not None:
                memory = self._tamper(number, self.site.memory, self._folder)
                self.site = replace(self.site, memory=memory)
        yield from answer(self.site, questions)


def train(
    folder: Path,
    wire: WireSettings,
    *,
    rounds: int = 5,
    tamper: Tamper | None = None,
    resume: bool = False,
    per_round: int = CLIENTS,
) -> list[dict[str, Any]]:
    """The history of a run; its sites start anew, with what lies on their disk."""
    settings = ServerSettings(
        rounds=rounds,
        clients=CLIENTS,
        clients_per_round=per_round,
        schedule="constant",
        eval_every=10,  # or every client had every state before it trains from it
        out=str(folder / "run"),
        resume=resume,
        wire=wire,
    )
    run_rounds(DirectExchange(Sites(folder / "sites", wire, tamper), CLIENTS), settings)
    return read_history(folder / "run")


def states(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/states/*.safetensors"))


# --- A client that holds something else --------------------------------------------------------------


def restarted(number: int, memory: Memory, folder: Path) -> Memory:
    return Memory(folder)


def flip_a_bit(number: int, memory: Memory, folder: Path) -> Memory:
    for path in states(folder):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    return Memory(folder)


def swap_names(number: int, memory: Memory, folder: Path) -> Memory:
    """Whole states, but each under the name of another."""
    paths = states(folder)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    return Memory(folder)


def lose_all(number: int, memory: Memory, folder: Path) -> Memory:
    shutil.rmtree(folder, ignore_errors=True)
    return Memory(folder)


def alter_in_place(number: int, memory: Memory, folder: Path) -> Memory:
    """As a fault in the machine's memory would: the digest was taken before."""
    for state in memory._states.values():
        state.dense["bank"][0, 0] += np.float32(2**-10)
    return memory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("undisturbed"), WIRES["default"])


@pytest.mark.parametrize("tamper", [flip_a_bit, swap_names, lose_all, alter_in_place])
def test_who_holds_something_else_asks_for_the_state_and_trains_on_nothing_wrong(
    tamper: Tamper, undisturbed: list[dict[str, Any]], tmp_path: Path
):
    def once(number: int, memory: Memory, folder: Path) -> Memory:
        return tamper(number, memory, folder) if number == 4 else memory

    found = train(tmp_path, WIRES["default"], tamper=once)
    assert [record["digest"] for record in found] == [record["digest"] for record in undisturbed]
    assert all(not record["rejected"] and not record["missing"] for record in found)
    pairs = zip(found, undisturbed, strict=True)
    down = [record["bytes"]["down"] - other["bytes"]["down"] for record, other in pairs]
    assert down[4] > 0, "the state was sent again"
    assert down[:4] == [0] * 4
    assert down[5] == 0, "from then on differences are enough"


def test_a_restart_with_a_sound_disk_needs_nothing_again(undisturbed: list[dict[str, Any]], tmp_path: Path):
    found = train(tmp_path, WIRES["default"], tamper=restarted)
    assert [record["bytes"]["down"] for record in found] == [
        record["bytes"]["down"] for record in undisturbed
    ]
    assert found[-1]["digest"] == undisturbed[-1]["digest"]


# --- What rounding drops -----------------------------------------------------------------------------

FEEDBACK = replace(WIRES["smallest"], feedback=True)


def test_error_feedback_outlives_restarts_of_server_and_clients(tmp_path: Path):
    whole = train(tmp_path / "whole", FEEDBACK, per_round=2)
    for rounds in (2, 3, 5):
        found = train(tmp_path / "parts", FEEDBACK, rounds=rounds, resume=rounds > 2, per_round=2)
    assert [record["digest"] for record in found] == [record["digest"] for record in whole]


@pytest.mark.parametrize("lost", ["clients", "server"])
def test_what_waits_would_be_missed(lost: str, tmp_path: Path):
    """Both memories take part: without either the run comes to other numbers, and goes on all the same."""
    whole = train(tmp_path / "whole", FEEDBACK)
    train(tmp_path / "parts", FEEDBACK, rounds=3)
    if lost == "clients":
        (waiting,) = (tmp_path / "parts" / "sites").glob("*/waiting")
        shutil.rmtree(waiting)
    else:
        path = tmp_path / "parts" / "run" / "checkpoints" / "server-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-50])
    found = train(tmp_path / "parts", FEEDBACK, resume=True)
    assert found[3]["digest"] == whole[3]["digest"]
    assert found[-1]["digest"] != whole[-1]["digest"]
    assert all(not record["rejected"] for record in found)


def test_the_reference_of_a_server_is_what_it_has_sent(tmp_path: Path):
    """Law 4: what clients hold on disk is the server's checkpoint, to the bit, in every round."""
    train(tmp_path, WIRES["default"])
    for path in states(tmp_path / "sites"):
        state, _ = load_state(path)
        checkpoint = tmp_path / "run" / "checkpoints" / f"round-{state.version:05d}.safetensors"
        assert load_state(checkpoint)[0].digest == state.digest
    assert len(states(tmp_path / "sites")) == 5


# --- The options, on the command line ----------------------------------------------------------------

# What is given, which bytes it concerns, and whether there are more of them (1), fewer (-1) or merely others.
OPTIONS: dict[str, tuple[list[str], str, int]] = {
    "default": ([], "bank", 0),
    "lossless": (["--wire", "lossless"], "bank", 1),
    "smallest": (["--wire", "smallest"], "bank", -1),
    "up": (["--wire-up-bits", "8"], "bank", 1),
    "bfloat16": (["--wire-up-bits", "16"], "bank", 1),
    "head": (["--wire-head-bits", "2"], "head", -1),
    "gaps": (["--wire-gap-bits", "1"], "selection", -1),
    "exact gaps": (["--wire-gap-bits", "32"], "selection", 1),
    "down": (["--wire-down-bits", "8"], "down", 1),
    "keep": (["--wire-keep", "0.1"], "bank", -1),
    "feedback": (["--wire-feedback", "on"], "bank", 0),
    "chance": (["--wire-stochastic", "on"], "bank", 0),
    "trellis": (["--wire-trellis", "on"], "bank", 0),
}


class Scale:
    """Weighs the messages of a run as they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up = self.down = 0
        encode, blob = serve.encode_update, Broadcast.blob

        def encoded(*arguments: Any) -> bytes:
            message = encode(*arguments)
            self.up += len(message)
            return message

        def sent(broadcast: Broadcast, client: str) -> bytes:
            message = blob(broadcast, client)
            self.down += len(message)
            return message

        monkeypatch.setattr(serve, "encode_update", encoded)
        monkeypatch.setattr(Broadcast, "blob", sent)


@pytest.fixture(scope="module")
def weighed() -> dict[str, dict[str, Any]]:
    """Bytes of each option by section, those of states, and where the run came to."""
    return {}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_bytes_and_the_summary_tells_them(
    name: str,
    weighed: dict[str, dict[str, Any]],
    fedvb: Run,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    options, concerned, sign = OPTIONS[name]
    scale = Scale(monkeypatch)
    shown = fedvb("simulate", *small, *options, "--out", "run")
    assert shown.code == 0, shown.err
    told, records = read_summary(tmp_path / "run")["bytes"], read_history(tmp_path / "run")
    assert sum(record["bytes"]["up"] for record in records) == scale.up
    assert sum(record["bytes"]["down"] + record["bytes"]["evaluate"] for record in records) == scale.down
    assert told["up_per_client_round"] == pytest.approx(scale.up / 6, abs=1)
    found: dict[str, Any] = {"digest": records[-1]["digest"], "down": scale.down}
    for section in ("bank", "head", "selection"):
        found[section] = sum(record["bytes"]["up_sections"].get(section, 0) for record in records[1:])
    assert found not in weighed.values()
    weighed[name] = found
    if sign and "default" in weighed:
        assert sign * (found[concerned] - weighed["default"][concerned]) > 0
