"""The ClientApp: Flower records in, Flower records out. What happens between is in `fl_client.serve`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_client.opening import open_site
from fl_client.serve import Answer, Question, answer
from fl_client.settings import SiteSettings

__all__ = ["Answers", "app", "handle"]

Answers = Callable[[Sequence[Question]], Iterable[Answer]]

CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client from the reference state in the message; reply with its update."""
    return next(handle([message], [context]))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the reference state on this client's part of the held-out texts; reply with sums."""
    return next(handle([message], [context]))


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this client is and which adapter it can train."""
    return next(handle([message], [context]))


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say everything that a server needs to start a run."""
    return next(handle([message], [context]))


def handle(
    messages: Sequence[Message], contexts: Sequence[Context], answers: Answers | None = None
) -> Iterator[Message]:
    """Answer messages of one type for the clients of one process; training is done in cohorts.

    Args:
        messages: of one type and, for training, of one round.
        contexts: the client of each; their run configs are equal.
        answers: who answers; None is the site that the run config describes, opened once and kept.
    """
    if answers is None:
        answers = partial(answer, open_site(SiteSettings.from_run_config(contexts[0].run_config)))
    pairs = zip(messages, contexts, strict=True)
    asked = {_client(context): message for message, context in pairs}
    for found in answers([_question(client, message) for client, message in asked.items()]):
        yield _reply(asked[found.client], found)


def _client(context: Context) -> int:
    """The number of the virtual client; a site of its own is client 0 of its data."""
    return int(context.node_config.get("partition-id", 0))


def _question(client: int, message: Message) -> Question:
    content = message.content
    blob = content.array_records["blob"]["blob"].data if "blob" in content else b""
    config = content.config_records.get("config", ConfigRecord())
    scalars = {name: value for name, value in config.items() if isinstance(value, bool | int | float | str)}
    return Question(client, message.metadata.message_type.removeprefix("query."), blob, scalars)


def _reply(message: Message, found: Answer) -> Message:
    if found.error:
        return Message(Error(CLIENT_APP_RAISED, found.error), reply_to=message)
    content = RecordDict({"text": ConfigRecord({"text": found.text, "client": str(found.client)})})
    if found.metrics:
        content["metrics"] = MetricRecord(dict(found.metrics))
    if found.blob:
        content["blob"] = ArrayRecord({"blob": Array("uint8", (len(found.blob),), "fedvb", found.blob)})
    return Message(content, reply_to=message)
