"""Flower's SuperLink in this process, behind the gate."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fl_server.gate import Gate, GateSettings

__all__ = ["run_superlink"]


def run_superlink(arguments: Sequence[str], settings: GateSettings) -> None:
    """Serve until Ctrl-C or SIGTERM; Flower's environment must be set before.

    Args:
        arguments: of `flower-superlink`.
        settings: of the gate, which is outside of all that Flower puts in front of its routes.
    """
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    # Whose word uvicorn would take for where a call comes from: then anyone's could be this machine.
    os.environ.pop("FORWARDED_ALLOW_IPS", None)
    others = extensions.get_middleware

    def with_gate() -> tuple[Middleware, ...]:
        return Middleware(Gate, settings=settings), *others()

    extensions.get_middleware = with_gate
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()
