"""The resident trainer's socket, with a site that only pretends to train."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from fl_client import thin, trainer
from fl_client.questions import Answer, Question, Scalar
from fl_client.resident import Resident
from fl_client.site import OnStep
from fl_client.thin import ask_trainer, trainer_listens, trainer_status, watch_trainer
from tests.conftest import ROOT
from vblora.errors import ConfigError, DataError, RunError, WireError
from vblora.files import alone

RUN: dict[str, Scalar] = {"rank": 2, "lr-bank": 0.5, "resume": False, "out": "somewhere"}


class FakeResident(Resident):
    """Counts steps; each ends when a test lets it."""

    def __init__(self) -> None:
        super().__init__({"model": "m", "data": "d"}, Path("nowhere"))
        self.go = threading.Semaphore(0)
        self.steps = 3
        self.asked: list[tuple[Question, Mapping[str, Scalar]]] = []
        self.told: list[int] = []
        self.fault: Exception | None = None

    def answer(self, question: Question, run: Mapping[str, Scalar], on_step: OnStep | None = None) -> Answer:
        self.asked.append((question, run))
        if self.fault is not None:
            raise self.fault
        if question.kind != "train":
            return Answer(0, text="here")
        for step in range(1, self.steps + 1):
            self.go.acquire()
            self.told.append(step)
            assert on_step is not None
            on_step(step, self.steps)
        return Answer(0, b"update", {"train-loss": float("nan"), "steps": self.steps})


@pytest.fixture
def resident() -> Iterator[FakeResident]:
    resident = FakeResident()
    yield resident
    # Python ends after the threads of the socket: a step that nobody lets end would hold up the whole run.
    resident.go.release(1_000_000)


@pytest.fixture
def socket(resident: FakeResident, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "trainer.sock"
    service = trainer._Service(resident, "m", "d", threading.Event())
    server = trainer._listen(path, service)
    yield path
    server.stop(grace=None).wait()


def test_question_run_and_answer_keep_their_types(socket: Path, resident: FakeResident):
    resident.go.release(3)
    question = Question(7, "train", b"\x00state", {"round": 3, "lr-scale": 0.5})
    found = ask_trainer(socket, question, RUN)
    (asked,) = resident.asked
    assert asked == (Question(0, "train", b"\x00state", {"round": 3, "lr-scale": 0.5}), RUN)
    assert {name: type(value) for name, value in asked[1].items()} == {
        name: type(value) for name, value in RUN.items()
    }
    assert (found.client, found.blob, found.metrics["steps"], found.error) == (7, b"update", 3, "")
    assert found.metrics["train-loss"] != found.metrics["train-loss"]


def test_large_blobs_pass(socket: Path, resident: FakeResident):
    assert ask_trainer(socket, Question(0, "evaluate", bytes(8 << 20)), RUN).text == "here"
    assert len(resident.asked[0][0].blob) == 8 << 20


def test_the_socket_is_its_owners_alone(socket: Path):
    assert socket.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("fault", [ConfigError("rank is odd"), WireError("blob: cut off")])
def test_what_does_not_fit_is_told_and_the_trainer_lives(
    fault: Exception, socket: Path, resident: FakeResident
):
    resident.fault = fault
    assert ask_trainer(socket, Question(0, "hello"), RUN).error == str(fault)
    resident.fault = None
    assert ask_trainer(socket, Question(0, "hello"), RUN) == Answer(0, text="here")


def test_what_breaks_is_told_and_the_trainer_lives(
    socket: Path, resident: FakeResident, caplog: pytest.LogCaptureFixture
):
    resident.fault = ZeroDivisionError("by zero")
    told = "it failed (ZeroDivisionError); the site's own log says why"
    assert ask_trainer(socket, Question(0, "hello"), RUN).error == told
    assert "hello: failed" in caplog.text
    assert trainer_status(socket).last == f"hello: refused: {told}"
    assert trainer_status(socket).answered == 0


def test_its_status_tells_no_path_and_no_text(resident: FakeResident, tmp_path: Path):
    service = trainer._Service(resident, str(tmp_path / "llama"), "./private/notes.csv", threading.Event())
    server = trainer._listen(tmp_path / "t.sock", service)
    resident.fault = DataError("/srv/private/notes.csv: line 3: 'Anna was ill'")
    ask_trainer(tmp_path / "t.sock", Question(0, "hello"), RUN)
    status = trainer_status(tmp_path / "t.sock")
    server.stop(grace=None).wait()
    assert (status.model, status.data) == ("llama", "notes.csv")
    assert status.last == "hello: refused: its data does not fit the run; the site's own log says why"


def test_another_protocol_is_refused(socket: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thin, "PROTOCOL", 99)
    assert "speaks protocol 2, the ClientApp 99" in ask_trainer(socket, Question(0, "hello"), RUN).error


def test_its_status_is_told_while_it_trains(socket: Path, resident: FakeResident):
    asking = threading.Thread(target=ask_trainer, args=(socket, Question(0, "train"), RUN))
    asking.start()
    resident.go.release()
    wait_until(lambda: trainer_status(socket).done == 1)
    status = trainer_status(socket)
    assert (status.busy, status.steps, status.model, status.data) == ("train", 3, "m", "d")
    resident.go.release(2)
    asking.join()
    status = trainer_status(socket)
    assert (status.busy, status.answered, status.gpu_bytes) == ("", 1, 0)


def test_gpu_memory_is_told(
    socket: Path, resident: FakeResident, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    resident.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 << 30)
    caplog.set_level("INFO", "fedvb.trainer")
    ask_trainer(socket, Question(0, "hello"), RUN)
    status = trainer_status(socket)
    assert (status.gpu_bytes, status.gpu_peak_bytes) == (3 << 30, 5 << 30)
    assert "GPU 3.00 GiB, at most 5.00" in caplog.text


def test_progress_is_streamed_while_it_trains(socket: Path, resident: FakeResident):
    asking = threading.Thread(target=ask_trainer, args=(socket, Question(0, "train"), RUN))
    watch = watch_trainer(socket)
    assert next(watch).busy == ""
    asking.start()
    told = []
    for status in watch:
        told.append((status.busy, status.done, status.steps))
        if not status.busy and status.answered:
            break
        resident.go.release()
    asking.join()
    assert told[:3] == [("train", 0, 0), ("train", 1, 3), ("train", 2, 3)]
    assert told[-1] == ("", 3, 3)
    assert status.last.startswith("train: ")


def test_watchers_leave_room_for_questions(socket: Path, resident: FakeResident):
    watches = [watch_trainer(socket) for _ in range(trainer.WATCHERS)]
    assert all(next(watch).pid for watch in watches)
    with pytest.raises(RunError, match="others watch it already"):
        next(watch_trainer(socket))
    assert ask_trainer(socket, Question(0, "hello"), RUN).text == "here"


def test_nobody_waits_longer_than_the_server(socket: Path, resident: FakeResident):
    resident.steps = 1_000_000
    found = ask_trainer(socket, Question(0, "train"), RUN, seconds=0.3)
    assert found.error == "trainer: it took longer than the server waits"
    step_until(lambda: not trainer_status(socket).busy, resident)
    assert re.fullmatch(r"train: dropped at step \d+ of 1000000, .*", trainer_status(socket).last)


def test_who_waits_for_his_turn_has_less_time(socket: Path, resident: FakeResident):
    first = threading.Thread(target=ask_trainer, args=(socket, Question(0, "train"), RUN))
    first.start()
    wait_until(lambda: resident.asked)
    config: dict[str, Scalar] = {"round": 1, "seconds": 60.0}
    second = threading.Thread(target=ask_trainer, args=(socket, Question(0, "train", b"", config), RUN))
    second.start()
    time.sleep(0.5)
    resident.go.release(6)
    first.join()
    second.join()
    assert 0 < float(resident.asked[1][0].config["seconds"]) < 59.6


def test_the_work_of_a_killed_caller_ends_and_the_next_is_served(socket: Path, resident: FakeResident):
    code = (
        "from pathlib import Path; from fl_client.thin import ask_trainer; "
        "from fl_client.questions import Question; "
        f"ask_trainer(Path({str(socket)!r}), Question(0, 'train'), {{}})"
    )
    resident.steps = 1_000_000
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: resident.asked)
    resident.go.release()
    wait_until(lambda: resident.told)
    caller.kill()
    caller.wait()
    step_until(lambda: not trainer_status(socket).busy, resident)
    assert "dropped at step" in trainer_status(socket).last
    resident.steps = 3
    resident.go.release(3)
    assert ask_trainer(socket, Question(0, "train"), RUN).blob == b"update"


def test_nobody_answers(tmp_path: Path):
    path = tmp_path / "none.sock"
    assert not trainer_listens(path)
    assert "does not run" in ask_trainer(path, Question(0, "hello"), RUN).error
    with pytest.raises(RunError, match="does not run"):
        trainer_status(path)


def test_a_long_path_is_named(tmp_path: Path):
    with pytest.raises(RunError, match="expected 107 at most"):
        trainer_listens(tmp_path / ("x" * 120))


def test_a_path_that_grpc_would_decode_is_named(tmp_path: Path):
    with pytest.raises(RunError, match="has a %, which gRPC decodes; choose one without"):
        trainer_listens(tmp_path / "a%20b.sock")


def test_one_trainer_a_folder(tmp_path: Path):
    with (
        alone(tmp_path / "lock", "--state s", "trainer", "end it"),
        pytest.raises(RunError, match=rf"--state {tmp_path}: in use by another trainer \(process \d+\)"),
    ):
        trainer.run_trainer({"model": "m", "data": "d"}, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_other_processes_of_its_user_cannot_look_into_it():
    """A node beside it would find the texts at /proc/PID/root."""
    code = (
        "import ctypes, sys; from simulations import cli\n"
        f"sys.argv = ['fedvb', 'trainer', '--model', 'm', '--data', 'd', '--state', {'x' * 200!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as left: sys.exit(left.code - 2 + ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_client_app_loads_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['datasets'] = None; "
        "import fl_client.app"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def step_until(true: Callable[[], object], resident: FakeResident) -> None:
    """Let one step after another end: when the socket tells that its caller has gone is its own affair."""

    def stepped() -> object:
        resident.go.release()
        return true()

    wait_until(stepped)


def wait_until(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
