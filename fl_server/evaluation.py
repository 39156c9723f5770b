"""The score of a state: clients sum over shards of a common test set, sites over their own; the server adds.

Beside it, on request, each client's own score: on its own held-out texts, with the parts that it keeps.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fl_server.exchange import Reply, Request, Scalar, client_order
from vblora.errors import UpdateError

__all__ = ["EVALUATORS", "MOST_LOSS", "ShardSums", "add_shards", "evaluation_requests", "mean_and_spread"]

MOST_LOSS = 1e6  # of one example: a client that names more is not believed, and sums stay finite
EVALUATORS = 10  # at most, of a common test set: more clients would only make its shards smaller


@dataclass(frozen=True)
class ShardSums:
    """Sums over texts. In a reply their names are "eval-examples" and so on; "own-examples" of its own texts.

    Attributes:
        examples: texts.
        loss_sum: of their losses.
        correct: texts that were classified right; 0 where the metric is the loss.
    """

    examples: int
    loss_sum: float
    correct: int

    @classmethod
    def read(cls, reply: Reply, kind: str = "eval") -> ShardSums:
        """Read a reply; `kind` is "eval" or "own".

        Raises:
            UpdateError: it is an error, lacks a sum, or holds one that cannot be.
        """
        if reply.error:
            raise UpdateError(f"evaluation: {reply.error}")
        told = reply.metrics
        try:
            sums = cls(
                int(told[f"{kind}-examples"]), float(told[f"{kind}-loss-sum"]), int(told[f"{kind}-correct"])
            )
        except (KeyError, ValueError, OverflowError) as error:
            raise UpdateError(f"evaluation: metrics {dict(told)!r:.200} lack or misstate {error}") from error
        most = MOST_LOSS * sums.examples
        if not (0 <= sums.correct <= sums.examples < 1 << 53 and 0 <= sums.loss_sum <= most):
            raise UpdateError(
                f"evaluation: metrics are {dict(told)!r:.200}, expected a loss of 0 to {MOST_LOSS:g} "
                "an example, and at most all correct"
            )
        return sums

    def score(self, metric: str) -> float:
        """Accuracy, or mean loss; there must be texts."""
        return (self.correct if metric == "accuracy" else self.loss_sum) / self.examples


def evaluation_requests(
    clients: Sequence[str], number: int, run: str, *, common: bool, own: bool = False, generate: int = 0
) -> list[Request]:
    """Ask clients to evaluate, each its contiguous shard; the state is yet to be put in.

    Args:
        clients: those that can be asked. Of a test set that is `common` to them the first few take a shard;
            else all do, as sites whose held-out texts are their own.
        number, run: of the round.
        common: see there.
        own: ask every client for its own score, too.
        generate: ask those with a shard for their share of the answers to so many prompts.
    """
    shards = min(len(clients), EVALUATORS) if common else len(clients)
    requests = []
    for at, name in enumerate(clients if own else clients[:shards]):
        config: dict[str, Scalar] = {"round": number, "run": run}
        if at < shards:
            config |= {"shard": at, "shards": shards} | ({"generate": generate} if generate else {})
        requests.append(Request(name, "evaluate", b"", config | ({"own": True} if own else {})))
    return requests


def add_shards(shards: Mapping[str, ShardSums]) -> ShardSums:
    """Add the shards of all clients, in the order of their names, so that the sum has the same bits again."""
    ordered = [shards[name] for name in sorted(shards, key=client_order)]
    return ShardSums(
        sum(shard.examples for shard in ordered),
        sum(shard.loss_sum for shard in ordered),
        sum(shard.correct for shard in ordered),
    )


def mean_and_spread(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of clients' own scores, each client counting the same; None of nobody."""
    if not scores:
        return None, None
    return statistics.fmean(scores), statistics.pstdev(scores)
