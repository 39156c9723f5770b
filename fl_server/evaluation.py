"""The score of a state: clients sum over shards of a common test set, the server adds the sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fl_server.exchange import Reply, Request, client_order
from vblora.errors import UpdateError

__all__ = ["EVALUATORS", "ShardSums", "add_shards", "shard_requests"]

EVALUATORS = 10  # at most: the test set is common, more clients would only make its shards smaller


@dataclass(frozen=True)
class ShardSums:
    """Sums over texts of the test set. In a reply their names are "eval-examples" and so on.

    Attributes:
        examples: texts.
        loss_sum: of their losses.
        correct: texts that were classified right; 0 where the metric is the loss.
    """

    examples: int
    loss_sum: float
    correct: int

    @classmethod
    def read(cls, reply: Reply) -> ShardSums:
        """Read a reply.

        Raises:
            UpdateError: it is an error, lacks a sum, or holds one that cannot be.
        """
        if reply.error:
            raise UpdateError(f"evaluation: {reply.error}")
        told = reply.metrics
        try:
            sums = cls(int(told["eval-examples"]), float(told["eval-loss-sum"]), int(told["eval-correct"]))
        except (KeyError, ValueError, OverflowError) as error:
            raise UpdateError(f"evaluation: metrics {dict(told)!r:.200} lack or misstate {error}") from error
        if not (math.isfinite(sums.loss_sum) and 0 <= sums.correct <= sums.examples < 1 << 53):
            raise UpdateError(f"evaluation: metrics are {dict(told)!r:.200}, expected finite sums")
        return sums


def shard_requests(clients: Sequence[str], number: int, run: str) -> list[Request]:
    """Ask each of the first clients to evaluate its contiguous shard; the state is yet to be put in."""
    names = clients[:EVALUATORS]
    return [
        Request(name, "evaluate", b"", {"round": number, "run": run, "shard": at, "shards": len(names)})
        for at, name in enumerate(names)
    ]


def add_shards(shards: Mapping[str, ShardSums]) -> ShardSums:
    """Add the shards of all clients, in the order of their names, so that the sum has the same bits again."""
    ordered = [shards[name] for name in sorted(shards, key=client_order)]
    return ShardSums(
        sum(shard.examples for shard in ordered),
        sum(shard.loss_sum for shard in ordered),
        sum(shard.correct for shard in ordered),
    )
