"""How processes that work for another one end: with it, and when they are no longer needed."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess

__all__ = ["PATIENCE", "end_processes", "end_with_parent"]

PATIENCE = 5.0  # seconds for a process to end by itself


def end_with_parent() -> None:
    """End this process once the one that started it is gone."""
    if parent := parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def end_processes(processes: Sequence[BaseProcess], patience: float = 0.0) -> None:
    """End processes that are no longer needed, after so many seconds in which they may end by themselves."""
    for process in processes:
        process.join(patience)
        process.terminate()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()
