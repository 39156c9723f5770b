"""The ClientApp: Flower records in, Flower records out. What happens between is in `fl_client.site`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_client.opening import open_site
from fl_client.settings import SiteSettings
from fl_client.site import OnStep, Site
from vblora.spec import Blueprint
from vblora.state import State
from vblora.wire import decode_state, encode_update

__all__ = ["app", "handle"]

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
    messages: Sequence[Message],
    contexts: Sequence[Context],
    on_step: OnStep | None = None,
) -> Iterator[Message]:
    """Answer messages of one type for the clients of one process, in their order; training is done in cohorts.

    Args:
        messages: of one type and, for training, of one round.
        contexts: the client of each; their run configs are equal.
        on_step: called with (steps done, steps in all) while training.
    """
    site = open_site(SiteSettings.from_run_config(contexts[0].run_config))
    kind = messages[0].metadata.message_type
    if kind == "train":
        yield from _train(site, messages, contexts, on_step)
        return
    for message, context in zip(messages, contexts, strict=True):
        if kind == "evaluate":
            yield _evaluate(site, message)
        elif kind == "query.hello":
            yield _hello(site, message, context)
        else:
            yield _reply(message, text=site.describe())


def _train(
    site: Site, messages: Sequence[Message], contexts: Sequence[Context], on_step: OnStep | None
) -> Iterator[Message]:
    config = messages[0].content.config_records["config"]
    trained = site.train_clients(
        _state(site, messages[0]),
        [_client(context) for context in contexts],
        round_number=int(str(config["round"])),
        scale=float(str(config["lr-scale"])),
        on_step=on_step,
    )
    for message, result in zip(messages, trained, strict=True):
        metrics = {"train-loss": result.loss, "examples": result.examples, "steps": result.steps}
        yield _reply(message, blob=encode_update(result.update, site.blueprint), metrics=metrics)


def _evaluate(site: Site, message: Message) -> Message:
    config = message.content.config_records["config"]
    sums = site.evaluate(_state(site, message), int(str(config["shard"])), int(str(config["shards"])))
    return _reply(message, metrics=sums)


def _hello(site: Site, message: Message, context: Context) -> Message:
    client = _client(context)
    text = {
        "fingerprint": site.blueprint.fingerprint.hex(),
        "examples": len(site.parts[client]),
        "versions": site.versions,
    }
    return _reply(message, text=json.dumps(text), client=str(client))


def _client(context: Context) -> int:
    """The number of the virtual client; a site of its own is client 0 of its data."""
    return int(context.node_config.get("partition-id", 0))


def _state(site: Site, message: Message) -> State:
    blob = message.content.array_records["blob"]["blob"].data
    return _decoded(blob, site.blueprint)


@lru_cache(maxsize=1)
def _decoded(blob: bytes, blueprint: Blueprint) -> State:
    """All clients of a round get the same bytes; read them once."""
    return decode_state(blob, blueprint)


def _reply(
    message: Message,
    *,
    blob: bytes = b"",
    metrics: dict[str, Any] | None = None,
    text: str = "",
    client: str = "",
) -> Message:
    content = RecordDict({"text": ConfigRecord({"text": text, "client": client})})
    if metrics is not None:
        content["metrics"] = MetricRecord(metrics)
    if blob:
        content["blob"] = ArrayRecord({"blob": Array("uint8", (len(blob),), "fedvb", blob)})
    return Message(content, reply_to=message)
