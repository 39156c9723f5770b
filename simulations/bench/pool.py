"""Processes that work through the items of a study, one item at a time each; one that dies costs its item."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from simulations.processes import end_with_parent

__all__ = ["in_processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    count: int,
    start: Callable[[int], None],
    seconds: float = 0.0,
) -> Iterator[tuple[Item, Result | None]]:
    """Items with what `work` makes of them, as they are done; None where the process died over it.

    Args:
        work: of a module, as `start` is: both are called in the processes.
        items: handed out in their order.
        count: processes at most.
        start: told each process's number, from 0, before it works; who follows a dead one has its number.
        seconds: to wait; what is not done then is given up. 0 is for ever.
    """
    waiting, end = deque(items), time.monotonic() + seconds
    processes: list[tuple[BaseProcess, Connection]] = []
    busy: dict[Connection, tuple[int, Item]] = {}

    def hand_out(number: int) -> None:
        if waiting:
            connection = processes[number][1]
            busy[connection] = number, waiting.popleft()
            with suppress(OSError):  # dead already: the next look at the connection tells
                connection.send(busy[connection][1])

    try:
        for number in range(min(count, len(items))):
            processes.append(_started(work, start, number))
            hand_out(number)
        while busy and (ready := wait(list(busy), max(0.0, end - time.monotonic()) if seconds else None)):
            for connection in ready:
                assert isinstance(connection, Connection)
                number, item = busy.pop(connection)
                result = None
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    processes[number] = _started(work, start, number)
                hand_out(number)
                yield item, result
    finally:
        for process, _ in processes:
            process.terminate()
        for process, _ in processes:
            process.join()


def _started(work: Any, start: Any, number: int) -> tuple[BaseProcess, Connection]:
    context = get_context("spawn")  # a forked CUDA or OpenMP runtime does not work
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, start, number), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(connection: Connection, work: Any, start: Any, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    threading.Thread(target=end_with_parent, daemon=True).start()  # killed, too
    start(number)
    with suppress(EOFError, OSError):  # nobody is there any more
        while True:
            connection.send(work(connection.recv()))
