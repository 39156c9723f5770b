"""The evaluation of a round: the common score, clients' own scores, and at the end generated texts."""

from __future__ import annotations

from fl_server.asking import Inbox, Run, ask, ordered, rejected
from fl_server.broadcast import Broadcast
from fl_server.evaluation import ShardSums, add_shards, evaluation_requests, mean_and_spread
from fl_server.exchange import client_order, one_line
from fl_server.handshake import Fault, name_faults
from fl_server.history import Record
from fl_server.text_scores import read_text_sums, text_scores
from vblora.errors import RunError, UpdateError

__all__ = ["evaluate"]


def evaluate(run: Run, reference: Broadcast, record: Record) -> None:
    """Score the reference on the held-out texts, and clients on their own ones; fill in the record.

    A shard that fails is left out and named; the score then covers `eval_examples`.

    Raises:
        RunError: before training, nothing can be scored.
    """
    settings, number = run.settings, record["round"]
    generate = settings.eval_generate if number == settings.rounds else 0
    requests = evaluation_requests(
        _there(run),
        number,
        run.name,
        common=not run.exchange.lasting,
        own=settings.scores_own,
        generate=generate,
    )
    sharers = {request.client for request in requests if "shards" in request.config}
    inbox = Inbox(request.client for request in requests)
    shards: dict[str, ShardSums] = {}
    own: dict[str, ShardSums] = {}
    texts = {}
    faults: list[Fault] = []
    for reply in inbox.first_of(ask(run, reference, requests, inbox)):
        record["bytes"]["evaluate"] += len(reply.blob)
        fault = ""
        try:
            if reply.client in sharers:
                shards[reply.client] = ShardSums.read(reply)
            if settings.scores_own:
                own[reply.client] = ShardSums.read(reply, "own")
            if reply.client in sharers and generate:
                texts[reply.client] = read_text_sums(reply)
        except UpdateError as error:
            fault = one_line(str(error))
            faults.append(Fault(reply.client, fault))
        run.observer.reply_received(number, "evaluate", reply.client, fault)

    record["bytes"]["evaluate"] += inbox.sent
    faults += [Fault(name, "evaluation: no reply in time") for name in inbox.waiting]
    record["rejected"] += rejected(faults)
    sums = add_shards(shards)
    if sums.examples:
        record["eval_examples"] = sums.examples
        record["eval_loss"] = sums.score("loss")
        record["score"] = sums.score(run.task.metric)
    elif number == 0:  # nothing is lost yet: better to tell now than after a night of training
        why = name_faults(ordered(faults)) or "the test set is empty"
        raise RunError(f"evaluation: no client could evaluate the initial state: {why}")
    scores = {name: own[name].score(run.task.metric) for name in own if own[name].examples}
    if settings.scores_own and not scores and number == 0:
        raise RunError(
            "own-scores: no client has held-out texts of its own; the held-out part must have the column "
            "that the training texts are dealt by"
        )
    record["own"] = {name: scores[name] for name in sorted(scores, key=client_order)}
    record["own_mean"], record["own_std"] = mean_and_spread(list(record["own"].values()))
    record["texts"] = text_scores(texts) if texts else {}


def _there(run: Run) -> list[str]:
    """The clients that can be asked now; all of them where none can, so that their absence is told."""
    present = set(run.exchange.present())
    return [name for name in run.clients if name in present] or list(run.clients)
