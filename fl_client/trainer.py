"""The resident trainer: keeps base, data and adapter loaded, and answers the ClientApps of its machine.

Flower starts a new process for every message. Here the next one finds everything in memory, behind a Unix
socket that only its own user can open. A caller that dies takes its question with it, nothing else.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import torch

from fl_client import trainer_pb2 as pb
from fl_client.discreet import name_for_server, reason_for_server
from fl_client.questions import Answer, Question, Scalar, with_less_time
from fl_client.resident import Budget, Resident
from fl_client.thin import OPTIONS, PROTOCOL, checked_socket, from_wire, to_wire, trainer_listens
from fl_client.trainer_pb2_grpc import TrainerServicer, add_TrainerServicer_to_server
from vblora.errors import FedVBError, RunError
from vblora.files import alone

__all__ = ["run_trainer"]

THREADS = 8  # one works; the others wait, or tell the status
WATCHERS = 4  # at most: they must leave threads for questions
PATIENCE = 0.2  # seconds between looks at whether a waiting caller still lives, and between told steps
TELL_EVERY = 5.0  # seconds between lines about the steps
GIB = 1 << 30

log = logging.getLogger("fedvb.trainer")


def run_trainer(
    own: Mapping[str, Scalar],
    state: Path,
    socket: Path | None = None,
    expected: Mapping[str, Scalar] | None = None,
    budget: Budget | None = None,
) -> None:
    """Load the site and answer until SIGTERM or Ctrl-C.

    Args:
        own: options of the site, by their names in a run config: they win over a run's.
        state: folder for what must outlive a message; one trainer at a time.
        socket: where to answer; None is trainer.sock in `state`.
        expected: options that the first run is expected to come with, to load by before it comes.
        budget: of a round.

    Raises:
        FedVBError: the site's model or data cannot be used, or another trainer has this folder or socket.
    """
    path = checked_socket(socket or state / "trainer.sock")
    if path.exists() and not path.is_socket():
        raise RunError(f"--socket {path}: there is something else of this name; choose another")
    for folder, option in ((state, "--state"), (path.parent, "--socket")):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise RunError(
                f"{option}: {folder} cannot be made ({error.strerror}); name a folder that you can write to"
            ) from error
    stopped = threading.Event()
    with alone(state / "lock", f"--state {state}", "trainer", "end that one, or name another folder"):
        if trainer_listens(path):
            raise RunError(
                f"socket {path}: another trainer answers there; give this one a --socket of its own"
            )
        service = _Service(Resident(own, state, budget), str(own["model"]), str(own["data"]), stopped)
        # First of all: whoever asks early waits, instead of loading by itself.
        server = _listen(path, service)
        try:
            service.load(expected or {})
            log.info("ready at %s", path)
            with _signals(stopped):  # not before: loading should end at once
                stopped.wait()
        finally:
            stopped.set()
            server.stop(grace=None).wait()
            path.unlink(missing_ok=True)
    log.info("stopped")


class _Stopped(Exception):
    """The caller has gone, or the trainer is to end."""


class _Service(TrainerServicer):
    """Answers one question at a time; knows what it is at."""

    def __init__(self, resident: Resident, model: str, data: str, stopped: threading.Event) -> None:
        self._resident = resident
        self._names = name_for_server(model), name_for_server(data)
        self._stopped = stopped
        self._turn = threading.Lock()
        self._watchers = threading.BoundedSemaphore(WATCHERS)
        self._answered = 0
        self._busy, self._done, self._steps = "", 0, 0
        self._last = ""

    def load(self, expected: Mapping[str, Scalar]) -> None:
        """Load base and texts before the first question is let through."""
        with self._turn, self._at_work("loading"):
            self._resident.load(expected)

    def Ask(self, request: pb.Question, context: grpc.ServicerContext) -> pb.Answer:
        if request.protocol != PROTOCOL:
            return pb.Answer(
                error=f"trainer: it speaks protocol {PROTOCOL}, the ClientApp {request.protocol}; install "
                "the server's version of fed-vblora here and start the trainer again"
            )
        question = Question(0, request.kind, request.blob, from_wire(request.config))
        came = time.monotonic()
        try:
            self._wait_for_turn(context)
            try:
                with self._at_work(request.kind):
                    left = with_less_time(question, time.monotonic() - came)
                    found = self._answer(left, from_wire(request.run), context)
            finally:
                self._turn.release()
        except _Stopped:
            context.abort(grpc.StatusCode.CANCELLED, "the trainer was stopped, or its caller has gone")
        return pb.Answer(blob=found.blob, metrics=to_wire(found.metrics), text=found.text, error=found.error)

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.TrainerStatus:
        now, peak = self._gpu_bytes()
        return pb.TrainerStatus(
            protocol=PROTOCOL,
            pid=os.getpid(),
            model=self._names[0],
            data=self._names[1],
            bases_loaded=self._resident.bases_loaded,
            answered=self._answered,
            busy=self._busy,
            done=self._done,
            steps=self._steps,
            gpu_bytes=now,
            gpu_peak_bytes=peak,
            last=self._last,
        )

    def Watch(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> Iterator[pb.TrainerStatus]:
        if not self._watchers.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS} others watch it already")
        try:
            told = None
            while context.is_active() and not self._stopped.is_set():
                if (status := self.Status(request, context)) != told:
                    told = status
                    yield status
                self._stopped.wait(PATIENCE)
        finally:
            self._watchers.release()

    def _answer(self, question: Question, run: Mapping[str, Scalar], context: grpc.ServicerContext) -> Answer:
        number = question.config.get("round")
        what = question.kind if number is None else f"{question.kind} round {number}"
        started, told = time.monotonic(), time.monotonic()

        def on_step(done: int, steps: int) -> None:
            nonlocal told
            self._done, self._steps = done, steps
            if self._stopped.is_set() or not context.is_active():
                raise _Stopped
            if done == 1:
                log.info("%s: first of %d steps after %.2f s", what, steps, time.monotonic() - started)
            elif time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                log.info("%s: step %d of %d", what, done, steps)

        try:
            found = self._resident.answer(question, run, on_step)
        except _Stopped:
            self._last = f"{what}: dropped at step {self._done} of {self._steps}, its caller has gone"
            log.warning("%s", self._last)
            raise
        except FedVBError as error:
            log.warning("%s: refused: %s", what, error)
            return self._refusal(what, error)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            log.error("%s: out of GPU memory: %s", what, error)
            return self._refusal(what, error)
        except Exception as error:  # the next question may well be answered
            log.exception("%s: failed", what)
            return self._refusal(what, error)
        self._answered += 1
        self._last = self._account(what, found, time.monotonic() - started)
        log.info("%s", self._last)
        return found

    def _refusal(self, what: str, error: Exception) -> Answer:
        """Whoever has the socket may hear the status as well: the error itself is for the log."""
        reason = reason_for_server(error)
        self._last = f"{what}: refused: {reason}"
        return Answer(0, error=reason)

    def _account(self, what: str, found: Answer, seconds: float) -> str:
        parts = [f"{what}: {seconds:.1f} s"]
        if "steps" in found.metrics:
            parts.append(f"{found.metrics['steps']} steps, loss {found.metrics['train-loss']:.4f}")
        if found.blob:
            parts.append(f"{len(found.blob):,} B")
        if found.error:
            parts.append(found.error)
        now, peak = self._gpu_bytes()
        if peak:
            parts.append(f"GPU {now / GIB:.2f} GiB, at most {peak / GIB:.2f}")
        return ", ".join(parts)

    def _gpu_bytes(self) -> tuple[int, int]:
        device = self._resident.device
        if device is None or device.type != "cuda":
            return 0, 0
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)

    def _wait_for_turn(self, context: grpc.ServicerContext) -> None:
        while not self._turn.acquire(timeout=PATIENCE):
            if self._stopped.is_set() or not context.is_active():
                raise _Stopped

    @contextmanager
    def _at_work(self, kind: str) -> Iterator[None]:
        self._busy, self._done, self._steps = kind, 0, 0
        try:
            yield
        finally:
            self._busy = ""


def _listen(path: Path, service: _Service) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(THREADS, thread_name_prefix="trainer"), options=OPTIONS)
    add_TrainerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    path.unlink(missing_ok=True)  # what a killed trainer left
    umask = os.umask(0o177)  # the socket is made readable and writable by its owner alone
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise RunError(f"socket {path}: cannot be made ({error})") from error
    finally:
        os.umask(umask)
    server.start()
    return server


@contextmanager
def _signals(stopped: threading.Event) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the trainer in order."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
