"""The round loop without Flower: clients are function calls. For benches and studies; `fedvb simulate` goes
through Flower.

A test holds both to one history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from fl_client.serve import Answer, Question
from fl_server.exchange import Reply, Request

__all__ = ["DirectExchange"]


class DirectExchange:
    """An `Exchange` whose clients are answered by one function, such as `partial(answer, site)`."""

    lasting: bool = False

    def __init__(self, answers: Callable[[Sequence[Question]], Iterable[Answer]], clients: int) -> None:
        self._answers = answers
        self._clients = clients

    def clients(self) -> list[str]:
        """The numbers 0 to C - 1, as names."""
        return [str(number) for number in range(self._clients)]

    def present(self) -> list[str]:
        """All of them, always."""
        return self.clients()

    def ask(self, requests: Sequence[Request], timeout: float) -> Iterator[Reply]:
        """Answer all requests, which are of one kind; nothing is ever late."""
        asked = [Question(int(item.client), item.kind, item.blob, item.config) for item in requests]
        for found in self._answers(asked):
            yield Reply(str(found.client), found.blob, found.metrics, found.text, found.error)
