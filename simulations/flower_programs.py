"""What `fedvb server` and `fedvb site` need to turn into Flower's programs."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from vblora.errors import RunError

__all__ = ["become", "environment", "make_home", "require_free", "warn_insecure"]


def environment(state: Path) -> dict[str, str]:
    """Variables for one of Flower's programs: its home in `state`, no message to its makers, no installing.

    What is set already wins, but for the home: it may be another program's. Flower starts others of its
    programs, so they must be on the path.
    """
    home = str((state / "flwr").absolute())
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    return {**quiet, **os.environ, "FLWR_HOME": home, "PATH": path}


def make_home(state: Path) -> None:
    """Make the folder of one of Flower's programs.

    Raises:
        RunError: it cannot be made.
    """
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RunError(
            f"--state: {state} cannot be made ({error.strerror}); name a folder that you can write to"
        ) from error


def become(program: str, arguments: Sequence[str], state: Path) -> None:
    """Turn this process into one of Flower's.

    Raises:
        RunError: it is not installed.
    """
    found = shutil.which(program, path=environment(state)["PATH"])
    if found is None:
        raise RunError(f"{program}: not found; pip install flwr")
    os.execve(found, [program, *arguments], environment(state))


def require_free(host: str, port: int) -> None:
    """See that nobody listens on a port already: Flower's own words for it are a traceback.

    Raises:
        RunError: it is taken, not allowed, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise RunError(
            f"--port: {host}:{port} cannot be listened on ({error.strerror}); choose another"
        ) from error


def warn_insecure() -> None:
    """Say what --insecure means."""
    print(
        "fedvb: --insecure: updates travel in plain text, and whoever reaches the port may join; for tests on"
        " one machine",
        file=sys.stderr,
    )
