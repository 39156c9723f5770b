"""The ClientApp: Flower records in, Flower records out. Flower starts it anew for every message.

Where the node names the socket of a resident trainer, that one does the work and this process loads no
torch; else `fl_client.serve` does it here. What a node says about itself with --node-config:

socket          of its trainer (`fedvb trainer`)
name            of the site in logs and histories; else its partition-id, else its node id
data, model...  its own files, where it trains without a trainer: `fl_client.questions.OWN_KEYS`
state           folder of what it remembers, where it trains without a trainer

A site that names a socket or data is a deployed one: nothing of its machine but answers goes to the server,
and it trains no longer than the server waits.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_client.discreet import described_for_server, reason_for_server
from fl_client.questions import OWN_KEYS, Answer, Question, Scalar, lone_config, of_lone_site
from fl_client.thin import ask_trainer, trainer_listens
from vblora.errors import RunError

if TYPE_CHECKING:  # it needs torch
    from fl_client.settings import SiteSettings

__all__ = ["Answers", "app", "handle"]

Answers = Callable[[Sequence[Question]], Iterable[Answer]]

ONE_OBJECT = 1 << 20  # bytes of a blob that travels with the text; the chunks of a larger one side by side
CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
SPARE, LEAST_SPARE = 0.1, 15.0  # share and seconds of the server's patience that are kept to send the answer

log = logging.getLogger("flwr.fedvb")
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
        answers: who answers; None is the trainer of the node, or the site that run and node describe, opened
            once and kept.
    """
    answers = answers or _answers(contexts[0], messages[0].metadata.ttl)
    pairs = zip(messages, contexts, strict=True)
    asked = {_client(context): (message, _name(context)) for message, context in pairs}
    for found in answers([_question(client, message) for client, (message, _) in asked.items()]):
        message, name = asked[found.client]
        yield _reply(message, name, found)


def _answers(context: Context, patience: float) -> Answers:
    """Who answers for a node, to a server that waits for so many seconds."""
    node, run = context.node_config, dict(context.run_config)
    own = {name: value for name, value in node.items() if name in OWN_KEYS}
    if "socket" in node:
        socket = Path(str(node["socket"]))
        if trainer_listens(socket):
            return partial(_from_trainer, socket, run, patience)
        if "data" not in own:  # never read what the server names instead
            log.error("no trainer answers at %s; start one, or give fedvb site --data and --model", socket)
            return _no_trainer
        log.warning("no trainer at %s: training in this process", socket)
    if "data" in own:
        return partial(_in_this_process, lone_config(run, own), context, patience)
    # Torch and all that needs it, only where there is no trainer.
    from fl_client.opening import open_site
    from fl_client.serve import answer
    from fl_client.settings import SiteSettings

    settings = SiteSettings.from_run_config({**run, **own})
    return partial(answer, open_site(_with_state(settings, context)))


def _from_trainer(
    socket: Path, run: dict[str, Scalar], patience: float, questions: Sequence[Question]
) -> Iterator[Answer]:
    for question in questions:
        asked = _in_time(question, patience, _spare(patience))
        yield _as_asked(question, ask_trainer(socket, asked, run, patience))


def _no_trainer(questions: Sequence[Question]) -> Iterator[Answer]:
    for question in questions:
        yield Answer(question.client, error="trainer: none runs at this site")


def _in_this_process(
    config: dict[str, Scalar], context: Context, patience: float, questions: Sequence[Question]
) -> Iterator[Answer]:
    """What a trainer does, without one: the site is opened for every process anew."""
    came, spare = time.monotonic(), _spare(patience)
    from fl_client.opening import open_site
    from fl_client.serve import answer
    from fl_client.settings import SiteSettings

    for question in questions:
        try:
            site = open_site(_with_state(SiteSettings.from_run_config(config), context))
            asked = _in_time(of_lone_site(question), patience - (time.monotonic() - came), spare)
            found = next(answer(site, [asked]))
            if question.kind == "describe":
                found = replace(found, text=described_for_server(found.text))
        except Exception as error:  # Flower would send what it says
            log.exception("%s: failed", question.kind)
            found = Answer(0, error=reason_for_server(error))
        yield _as_asked(question, found)


def _spare(patience: float) -> float:
    """Of the seconds that a server waits, those that are kept to send the answer."""
    return max(SPARE * patience, min(LEAST_SPARE, patience / 2))


def _in_time(question: Question, left: float, spare: float) -> Question:
    """A question to train for no longer than leaves `spare` of the seconds left; a step in any case."""
    if question.kind != "train":
        return question
    given = float(question.config.get("seconds", 0)) or left
    return replace(question, config={**question.config, "seconds": max(1e-3, min(given, left - spare))})


def _as_asked(question: Question, found: Answer) -> Answer:
    """A lone site calls its client 0; the answer is of the client that was asked."""
    return Answer(question.client, found.blob, found.metrics, found.text, found.error)


def _with_state(settings: SiteSettings, context: Context) -> SiteSettings:
    """The settings with the folder of what the client keeps.

    Raises:
        RunError: there is none, and the run has it keep a part of its own.
    """
    folder = _state_folder(context)
    if settings.personal.parts and not folder:
        raise RunError(
            f"personal {settings.personal.personal}: this node keeps nothing between messages; name a folder "
            "with --node-config state=..., or start a trainer"
        )
    return replace(settings, state=folder)


def _state_folder(context: Context) -> str:
    """Where a client keeps what it must remember: its node says, or in a simulation the run's directory.

    A deployed node that says nothing remembers nothing: it gets states from version 0. Only on Ray, which is
    this machine's simulation, is the server's word taken for a path.
    """
    if "state" in context.node_config or "ray" not in sys.modules:
        return str(context.node_config.get("state", ""))
    return str(Path(str(context.run_config["out"])) / "clients")


def _client(context: Context) -> int:
    """The number of the virtual client."""
    return int(context.node_config.get("partition-id", 0))


def _name(context: Context) -> str:
    """What the server is to call this client; "" leaves it to the server."""
    node = context.node_config
    given = node.get("name", node.get("partition-id", "" if "socket" in node or "data" in node else 0))
    return str(given)


def _question(client: int, message: Message) -> Question:
    content = message.content
    config = content.config_records.get("config", ConfigRecord())
    scalars = {name: value for name, value in config.items() if isinstance(value, bool | int | float | str)}
    return Question(client, message.metadata.message_type.removeprefix("query."), _blob(content), scalars)


def _reply(message: Message, name: str, found: Answer) -> Message:
    if found.error:
        return Message(Error(CLIENT_APP_RAISED, found.error), reply_to=message)
    told = ConfigRecord({**found.metrics, "text": found.text, "client": name})
    content = RecordDict({"text": told})
    if 0 < len(found.blob) <= ONE_OBJECT:
        told["blob"] = found.blob
    if len(found.blob) > ONE_OBJECT:
        blob = Array("uint8", (len(found.blob),), "fedvb", found.blob)
        content["blob"] = ArrayRecord({"blob": blob})
    return Message(content, reply_to=message)


def _blob(content: RecordDict) -> bytes:
    record = content.get("blob")
    if isinstance(record, ArrayRecord):
        return record["blob"].data
    return bytes(record["blob"]) if isinstance(record, ConfigRecord) else b""  # type: ignore[arg-type]
