"""What a site tells a server about itself beside its updates: no path of its machine, no text of its data.

Error messages are for the site's own log: a parser quotes the line that it could not read.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from pathlib import Path

from vblora.errors import DataError, FedVBError, StartError

__all__ = ["described_for_server", "name_for_server", "reason_for_server", "shut_out_others"]

LOG = "the site's own log says why"
OUT_OF_MEMORY = "out of GPU memory; lower batch-size or max-length, or take a smaller dtype"
PR_SET_DUMPABLE = 4  # of prctl

log = logging.getLogger(__name__)


def shut_out_others() -> None:
    """Close /proc/PID to processes of the same user: a SuperNode's unit hides the texts from it, but
    /proc/PID/root of a trainer would lead to them, and /proc/PID/mem to what it has read."""
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        log.warning("prctl: other processes of this user can read this one's memory and files")


def described_for_server(described: str) -> str:
    """The JSON of a site's description with the names of its files, without their folders."""
    told = json.loads(described)
    for key in ("model", "data"):
        told[key] = name_for_server(told[key])
    return json.dumps(told)


def name_for_server(name: str) -> str:
    """The name of a model or of data, where it is a path without the folders."""
    path = Path(name).expanduser()
    if name.startswith((".", "~")) or path.is_absolute() or path.exists():
        return path.absolute().name
    return name


def reason_for_server(error: Exception) -> str:
    """Why a site cannot answer, in words that hold nothing of its files."""
    if isinstance(error, DataError):
        return f"its data does not fit the run; {LOG}"
    if isinstance(error, StartError) or (isinstance(error, FedVBError) and "/" in str(error)):  # a path
        return f"its files or its settings do not serve the run; {LOG}"
    if isinstance(error, FedVBError):  # about the run's settings, the adapter or the server's message
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not need
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.strerror:
        return f"it failed ({error.strerror}); {LOG}"
    return f"it failed ({type(error).__name__}); {LOG}"
