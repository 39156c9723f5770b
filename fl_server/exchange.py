"""The seam between the round loop and whatever carries its messages: Flower's grid, or a fake in a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = ["NEED_STATE", "Exchange", "Kind", "Reply", "Request", "Scalar", "client_order", "one_line"]

Kind = Literal["hello", "describe", "train", "evaluate"]
Scalar = int | float | str | bool
MAX_REASON = 500  # characters kept of what a client says: a blob may hold long names
NEED_STATE = "need-state"  # `Reply.text` of a client that lacks what a blob builds on


@dataclass(frozen=True)
class Request:
    """What the server asks of one client.

    Attributes:
        client: its name.
        kind: "hello" and "describe" are answered in `Reply.text`, "train" by a blob, "evaluate" by metrics.
        blob: the reference state for "train" and "evaluate", as this client can read it, else empty.
        config: what the client must know beside the state.
    """

    client: str
    kind: Kind
    blob: bytes = b""
    config: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What one client answered.

    Attributes:
        client: its name.
        blob: the encoded update, for "train".
        metrics: numbers about the work done; "dropped" is 1 where the client says that it does none.
        text: JSON, for "hello" and "describe"; why, where it dropped out; `NEED_STATE`.
        error: why there is no answer; everything else is then empty.
    """

    client: str
    blob: bytes = b""
    metrics: Mapping[str, int | float] = field(default_factory=dict)
    text: str = ""
    error: str = ""


class Exchange(Protocol):
    """Carries requests out and replies back."""

    def clients(self) -> list[str]:
        """Names of all clients, in `client_order`."""
        ...

    lasting: bool  # whether clients are sites: late, gone and back again, with held-out texts of their own

    def present(self) -> list[str]:
        """Names of those that can be reached now, in any order."""
        ...

    def ask(self, requests: Sequence[Request], timeout: float) -> Iterator[Reply]:
        """Send all requests and yield replies as they arrive, in any order, for about `timeout` seconds.

        A client that never answered is missing; nobody is waited for once the caller drops the iterator.
        """
        ...


def client_order(name: str) -> tuple[bool, int, str]:
    """Sort key of client names: numbers by value, before all others."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def one_line(text: str) -> str:
    """What a client says, fit for a log: on one line, printable, and cut.

    Else it could forge lines of others, or steer the terminal that shows them.
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: 10 * MAX_REASON])
    return " ".join(printable.split())[:MAX_REASON]
