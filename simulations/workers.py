"""Several processes at one simulation: this one and its helpers, one a GPU (or a few on a CPU).

Every process holds its own base model. Questions are handed out in pieces to whoever is free, those that take
longest first, so uneven clients do not leave a process idle; what a client answers depends on nothing but the
question.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from fl_client.cohort import ON_CPU, out_of_memory
from fl_client.opening import open_site
from fl_client.serve import Answer, Question, answer
from fl_client.settings import SiteSettings
from fl_client.site import OnStep, Site
from simulations.processes import PATIENCE, end_processes
from vblora.errors import ConfigError, FedVBError, RunError

__all__ = ["Helpers", "Workers", "count_workers"]

Piece = list[Question]
Answers = Callable[[Sequence[Question]], Iterator[Answer]]
Ready = queue.SimpleQueue[Answer | BaseException | None]

ROOM = (
    "with one client: lower --batch-size or --max-length, raise --accumulate, "
    "or try --checkpointing, --recompute"
)
ROOM_TO_EVALUATE = "in evaluation: lower --max-length, or try --dtype bfloat16, --quantize"


def count_workers(asked: int, device: torch.device) -> int:
    """Processes to use: what was asked for, else one a GPU, else one.

    Raises:
        ConfigError: more than there are GPUs.
    """
    if device.type != "cuda":
        return asked or 1
    there = torch.cuda.device_count() - (device.index or 0)
    if asked > there:
        raise ConfigError(f"--workers: {asked} asked for, there are {there} GPUs from {device}; one GPU each")
    return asked or (there if device.index is None else 1)


class Helpers:
    """Processes that answer pieces of questions beside this one, until `close`.

    Args:
        openers: one a process; called there for every piece, so each should keep what it opens.
    """

    def __init__(self, openers: Sequence[Callable[[], Answers]]) -> None:
        context = get_context("spawn")  # a forked CUDA or OpenMP runtime does not work
        self._connections: list[Connection] = []
        self._processes = []
        with _interrupts_ignored():  # by what starts here: a terminal sends Ctrl-C to all, and we end them
            for opener in openers:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, opener), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()  # who is idle goes home at once, with all that it has opened
        end_processes(self._processes, PATIENCE)

    def terminate(self) -> None:
        """End the processes, whatever they are at."""
        end_processes(self._processes)

    def answer(self, own: Answers, pieces: Iterable[Piece]) -> Iterator[Answer]:
        """Answers as they are ready, in any order; `own` is this process's way to them.

        An error that concerns the run, not a client, ends the processes.

        Raises:
            RunError: a process died.
        """
        left = deque(pieces)
        ready: Ready = queue.SimpleQueue()
        feeders = [
            threading.Thread(target=_feed, args=(connection, left, ready), daemon=True)
            for connection in self._connections
        ]
        for feeder in feeders:
            feeder.start()
        through = 0
        try:
            while piece := _take(left):
                for found in own(piece):
                    yield found
                    through += yield from _taken(ready)
            while through < len(feeders):
                through += yield from _taken(ready, wait=True)
        except BaseException as error:
            if not isinstance(error, GeneratorExit) and not _concerns_a_client(error):
                self.terminate()
            raise
        finally:  # after an error too: no answer to these questions may reach the next caller
            left.clear()
            for feeder in feeders:
                feeder.join()


class Workers:
    """Answers questions with `count` processes, this one among them. A context manager: leaving it ends the
    others.

    Raises:
        RunError: a process died.
    """

    def __init__(self, site: Site, count: int) -> None:
        self._site = site
        self._count = count
        threads = max(1, (os.cpu_count() or 1) // count)
        if count > 1 and site.model.device.type == "cpu":
            torch.set_num_threads(threads)
        devices = [_device(site.model.device, number) for number in range(1, count)]
        self._helpers = Helpers(
            [partial(_site_answers, replace(site.settings, device=device), threads) for device in devices]
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._helpers.terminate()
        self._helpers.close()

    def answer(self, questions: Sequence[Question], on_step: OnStep | None = None) -> Iterator[Answer]:
        """As `fl_client.serve.answer`; answers come as they are ready, in any order.

        Raises:
            RunError: a process died, or there is no memory for a single client.
        """
        own = partial(_answered, self._site, on_step=on_step)
        if self._count == 1 or not questions or questions[0].kind in ("hello", "describe"):
            return own(questions)
        return self._helpers.answer(own, self._pieces(questions))

    def _pieces(self, questions: Sequence[Question]) -> Iterator[Piece]:
        """Even shares on GPUs, unless the size of a cohort is given; on a CPU cohorts, small ones last."""
        ordered, cohort = self._ordered(questions), self._site.settings.cohort
        if self._site.model.device.type == "cpu":
            while ordered:
                size = max(1, min(cohort or ON_CPU, len(ordered) // (2 * self._count)))
                yield ordered[:size]
                ordered = ordered[size:]
        elif cohort:
            yield from (ordered[start : start + cohort] for start in range(0, len(ordered), cohort))
        else:
            yield from (share for at in range(self._count) if (share := ordered[at :: self._count]))

    def _ordered(self, questions: Sequence[Question]) -> Piece:
        """Training: the client with most to do first."""
        if questions[0].kind != "train":
            return list(questions)
        by_client = {question.client: question for question in questions}
        number = int(questions[0].config["round"])
        return [by_client[client] for client in self._site.by_work(by_client, number)]


def _device(first: torch.device, number: int) -> str:
    return f"cuda:{(first.index or 0) + number}" if first.type == "cuda" else str(first)


def _take(pieces: deque[Piece]) -> Piece:
    try:
        return pieces.popleft()
    except IndexError:
        return []


def _feed(connection: Connection, pieces: deque[Piece], ready: Ready) -> None:
    """Give pieces to one process until none is left, then say so with None. Runs in a thread."""
    try:
        while piece := _take(pieces):
            connection.send(piece)
            while (found := connection.recv()) is not None:
                ready.put(found)
    except (EOFError, OSError) as error:
        advice = "go on with --resume, with fewer --workers if memory was short"
        ready.put(RunError(f"a worker process died ({type(error).__name__}); {advice}"))
    except Exception as error:  # what is sent cannot be pickled, say
        ready.put(error)
    finally:
        ready.put(None)


def _taken(ready: Ready, wait: bool = False) -> Generator[Answer, None, int]:
    """What the others have answered so far, or with `wait` at least one thing that they say.

    Returns:
        How many of them are through.

    Raises:
        BaseException: what they raised.
    """
    through = 0
    while wait or not ready.empty():
        wait = False
        found = ready.get()
        if isinstance(found, BaseException):
            raise found
        if found is None:
            through += 1
        else:
            yield found
    return through


def _concerns_a_client(error: BaseException) -> bool:
    """See `InProcessGrid`: the others are asked again then."""
    return isinstance(error, FedVBError) and not isinstance(error, RunError)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C does nothing, here and in processes started meanwhile. Only the main thread can see to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _site_answers(settings: SiteSettings, threads: int) -> Answers:
    """How a helper of a site answers: the site is opened when first asked, and kept."""
    torch.set_num_threads(threads)
    return partial(_answered, open_site(settings))


def _answered(site: Site, questions: Sequence[Question], on_step: OnStep | None = None) -> Iterator[Answer]:
    """As `fl_client.serve.answer`, and where memory is short it says what to do."""
    try:
        yield from answer(site, questions, on_step)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        advice = ROOM if questions[0].kind == "train" else ROOM_TO_EVALUATE
        raise RunError(f"out of memory {advice}") from error


def _serve(connection: Connection, opener: Callable[[], Answers]) -> None:
    """The life of a helper process: answer piece after piece. Who started it acts on interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # libraries' semaphores want to be cleaned up
    try:
        while True:
            piece: Piece = connection.recv()
            try:
                for found in opener()(piece):
                    connection.send(found)
            except FedVBError as error:
                connection.send(error)
            except Exception:
                connection.send(RunError(f"a worker process failed: {traceback.format_exc(limit=-3)}"))
            connection.send(None)  # the piece is done
    except (EOFError, OSError):
        return  # the simulation has ended
