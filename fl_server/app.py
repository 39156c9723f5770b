"""The ServerApp: a thin shell that lets the round loop speak through Flower's grid."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fl_server.config_file import require_same_config
from fl_server.events import EventLog, Several
from fl_server.exchange import Kind, Reply, Request, client_order, one_line
from fl_server.history import History
from fl_server.observer import LogObserver, Observer
from fl_server.plot import plot_score
from fl_server.rounds import run_rounds
from fl_server.settings import ServerSettings
from vblora.errors import FedVBError, RunError

__all__ = ["BLOB_STYPE", "GridExchange", "app"]

BLOB_STYPE = "fedvb"  # our own bytes: Flower carries any serialisation type and reads none of them
ONE_OBJECT = 1 << 20  # bytes of a blob that travels in one piece
MESSAGE_TYPES: Mapping[Kind, str] = {
    "hello": "query.hello",
    "describe": "query.describe",
    "train": "train",
    "evaluate": "evaluate",
}
SHORTEST_PAUSE, LONGEST_PAUSE = 0.02, 3.0  # between polls, seconds; Flower's own grid polls every 3
PATIENCE, TELL_EVERY = 5.0, 60.0  # seconds before it says that it waits for clients, and says it again
GREETING_SECONDS = 60.0  # for a node that comes during a run to tell its name
NAMELESS_SECONDS = 30.0  # before one that told none is asked again
GREET_AGAIN = 10.0  # seconds before a site without its trainer is greeted again
NO_TRAINER = "trainer: "  # so begins the error of a ClientApp whose trainer does not answer
MAX_NAME = 64  # characters of what a client calls itself

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WRAPPING = re.compile(r"^<class '(?:\w+\.)*(\w+)'>:<'")  # of a SuperNode: <class 'ValueError'>:<'message'>
RAY_MARK = "Exception ClientAppException occurred. Message: "  # of Ray: after a traceback of 30 lines

# Below Flower's logger, whose handlers show it in `flwr run --stream`.
log = logging.getLogger("flwr.fedvb")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and leave a whole run directory. A grid may bring its own `observer`, who hears all."""
    own = getattr(grid, "observer", None)
    try:
        settings = ServerSettings.from_run_config(context.run_config)
        out = Path(settings.out)
        History(out).check(settings.resume)  # before anyone loads a model for nothing
        if settings.resume:
            require_same_config(out, context.run_config)
        observer = Several(own or LogObserver(log), EventLog(out))
        # A run that goes on may do so without a site that never comes back; a new one needs all.
        least = settings.quorum if settings.resume else settings.clients
        exchange = GridExchange.meet(grid, settings.clients, settings.wait_seconds, observer, least)
        run_rounds(exchange, settings, observer, context.run_config)
        plot_score([out], out / "score.png")
    except (FedVBError, OSError) as error:  # a full disk, a folder that cannot be written to
        if own is None:  # else who brought it tells
            log.error("%s", error)
        raise


class GridExchange:
    """An `Exchange` over Flower's grid.

    A message holds the config and the blob, whose record requests share; a reply the text, the client's name,
    the metrics and the blob. Each record is an object that costs a kilobyte of headers, so small blobs travel
    in one piece, those of replies with the text.
    """

    def __init__(self, grid: Grid, nodes: Mapping[str, int], hellos: Mapping[str, Reply]) -> None:
        """See `meet`. `nodes` maps names to node ids, `hellos` names to the replies that told them."""
        self.lasting = _is_lasting(grid)
        self._grid = grid
        self._ask_again: dict[int, float] = {}  # when, of nodes that are nobody's yet
        self._nodes = dict(nodes)
        self._hellos = dict(hellos)

    @classmethod
    def meet(
        cls,
        grid: Grid,
        count: int,
        wait_seconds: float,
        observer: Observer | None = None,
        least: int | None = None,
    ) -> GridExchange:
        """Wait for `count` nodes and learn the names of their clients: node ids are random, names are not.

        A node that does not tell its name is called `node-ID`, and so are those of one name, whose hellos
        are errors. Of more clients the first `count` take part, those with errors last; of fewer, once the
        time is over, all, where they are at least `least`. Sites without their trainer are waited for.

        Raises:
            RunError: too few nodes in time.
        """
        nodes: dict[str, int] = {}
        hellos: dict[str, Reply] = {}
        present = _wait_for_nodes(grid, count, count if least is None else least, wait_seconds, observer)
        greeted = _greet_until_ready(grid, present, count, wait_seconds, observer)
        refused = _namesakes(greeted)
        for node, name, reply in greeted:
            if node in refused:
                name = _placeholder(node)
                reply = Reply(name, error=refused[node])
            nodes[name] = node
            if reply is not None:
                hellos[name] = reply
        ready = {name for name, hello in hellos.items() if not hello.error}
        chosen = sorted(nodes, key=lambda name: (name not in ready, client_order(name)))[:count]
        return cls(grid, {name: nodes[name] for name in chosen}, hellos)

    def clients(self) -> list[str]:
        """Names of all clients, in `client_order`."""
        return sorted(self._nodes, key=client_order)

    def present(self) -> list[str]:
        """Names of the clients whose nodes the SuperLink sees now.

        A node that was started anew may come with another id. New ones are asked for their name; who says
        one whose node is gone takes its place. Who says none, as while its trainer loads, is asked again.
        """
        now = time.monotonic()
        online = set(self._grid.get_node_ids())
        gone = {name for name, node in self._nodes.items() if node not in online}
        known = set(self._nodes.values())
        new = [node for node in sorted(online - known) if self._ask_again.get(node, now) <= now]
        if gone and new:
            for node, name, _ in _greet(self._grid, new, GREETING_SECONDS):
                if name in gone:
                    log.info("client %s is back as node %d", name, node)
                    self._nodes[name] = node
                    gone.remove(name)
                else:
                    wait = NAMELESS_SECONDS if name == _placeholder(node) else math.inf
                    self._ask_again[node] = time.monotonic() + wait
        return [name for name in self._nodes if name not in gone]

    def ask(self, requests: Sequence[Request], timeout: float) -> Iterator[Reply]:
        """Send all requests and yield replies as they arrive; what comes after `timeout` seconds is lost."""
        names = {node: name for name, node in self._nodes.items()}
        asked = []
        for request in requests:
            if request.kind != "hello":
                asked.append((self._nodes[request.client], request))
            elif request.client in self._hellos:  # `meet` has asked already
                yield self._hellos[request.client]
        for node, answer in _deliver(self._grid, _messages(asked, timeout), timeout):
            yield _read_reply(names[node], answer)


def _is_lasting(grid: Grid) -> bool:
    return not getattr(grid, "in_process", False)


def _greet_until_ready(
    grid: Grid, ids: Sequence[int], count: int, seconds: float, observer: Observer | None
) -> list[tuple[int, str, Reply | None]]:
    """As `_greet`; sites without their trainer again, while fewer than `count` are ready and time is left."""
    started = time.monotonic()
    told = started - TELL_EVERY
    greeted = {found[0]: found for found in _greet(grid, ids, seconds)}
    while _is_lasting(grid):
        away = [node for node, _, reply in greeted.values() if reply and reply.error.startswith(NO_TRAINER)]
        left = started + seconds - time.monotonic()
        if not away or len(ids) - len(away) >= count or left <= GREET_AGAIN:
            break
        if observer is not None and time.monotonic() - told >= TELL_EVERY:
            told = time.monotonic()
            ready, names = len(ids) - len(away), ", ".join(map(_placeholder, away))
            observer.waiting(f"{ready} of {count} clients are ready; no trainer at {names:.300}", left)
        time.sleep(GREET_AGAIN)
        greeted |= {found[0]: found for found in _greet(grid, away, left - GREET_AGAIN)}
    return list(greeted.values())


def _greet(grid: Grid, ids: Sequence[int], seconds: float) -> Iterator[tuple[int, str, Reply | None]]:
    """(node, name, hello) of nodes in their order; who tells no name, or nothing, is called `node-ID`."""
    messages = _messages([(node, Request("", "hello")) for node in ids], seconds)
    answers = dict(_deliver(grid, messages, seconds))
    for node in ids:
        reply = _read_reply("", answers[node]) if node in answers else None
        name = _checked_name(reply) or _placeholder(node)
        yield node, name, reply and Reply(name, reply.blob, reply.metrics, reply.text, reply.error)


def _namesakes(greeted: Sequence[tuple[int, str, Reply | None]]) -> dict[int, str]:
    """Why nodes are refused that say the name of another; which of them it belongs to nobody knows."""
    named: dict[str, list[int]] = {}
    for node, name, _ in greeted:
        for taken in {name, _placeholder(node)}:
            named.setdefault(taken, []).append(node)
    return {
        node: f"nodes {' and '.join(map(str, named[name]))} have one name, {name}; give each its own "
        "(fedvb site --name; without fedvb, name or partition-id in --node-config)"
        for node, name, _ in greeted
        if len(named[name]) > 1
    }


def _placeholder(node: int) -> str:
    return f"node-{node}"


def _wait_for_nodes(
    grid: Grid, count: int, least: int, wait_seconds: float, observer: Observer | None
) -> list[int]:
    # Flower starts the ServerApp before its nodes have registered, and would sample from those it sees.
    started = time.monotonic()
    deadline, told = started + wait_seconds, started - TELL_EVERY + PATIENCE
    while len(ids := sorted(grid.get_node_ids())) < count:
        now = time.monotonic()
        if now >= deadline and len(ids) < least:
            raise RunError(
                f"{len(ids)} of {count} clients came within {wait_seconds:g} seconds; start the others, "
                "raise wait-seconds, or lower clients"
            )
        if now >= deadline:
            log.warning("%d of %d clients came within %g seconds: going on", len(ids), count, wait_seconds)
            break
        if observer is not None and now - told >= TELL_EVERY:
            told = now
            observer.waiting(f"{len(ids)} of {count} clients have come", deadline - now)
        time.sleep(0.2)
    return ids


def _messages(asked: Sequence[tuple[int, Request]], timeout: float) -> list[Message]:
    """One message for each node. Requests of one blob share its record: it is hashed and uploaded once."""
    blobs: dict[int, ArrayRecord | ConfigRecord] = {}
    messages = []
    for node, request in asked:
        content = RecordDict({"config": ConfigRecord(dict(request.config))})
        if request.blob:
            content["blob"] = blobs.setdefault(id(request.blob), _blob_record(request.blob))
        group = str(request.config.get("round", ""))
        messages.append(
            Message(content, node, MESSAGE_TYPES[request.kind], ttl=max(1.0, timeout), group_id=group)
        )
    return messages


def _deliver(grid: Grid, messages: list[Message], timeout: float) -> Iterator[tuple[int, Message | str]]:
    """Push messages and yield (node, reply), or why there is none, as replies come in."""
    pushed = set(grid.push_messages(messages))
    nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    messages.clear()
    for lost in nodes.keys() - pushed:
        yield nodes.pop(lost), "the message could not be sent"
    deadline, pause = time.monotonic() + timeout, SHORTEST_PAUSE
    while nodes:
        replies = list(grid.pull_messages(list(nodes)))
        for reply in replies:
            node = nodes.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, reply
        if replies:
            pause = SHORTEST_PAUSE
        elif (left := deadline - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
        else:  # only here: a reply that has already come is never thrown away
            return


def _read_reply(name: str, answer: Message | str) -> Reply:
    """Map a reply message, which a client may have written wrong. An empty `name` is taken from it."""
    if isinstance(answer, str):
        return Reply(name, error=answer)
    if answer.has_error():
        return Reply(name, error=_reason(answer.error))
    try:
        content = answer.content
        config = content.get("text", ConfigRecord())
        return Reply(
            name or str(config.get("client", "")),
            _blob_bytes(content.get("blob", config)),
            {key: value for key, value in config.items() if isinstance(value, int | float)},
            str(config.get("text", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"its message is not as expected ({type(error).__name__}: {error})"
        return Reply(name, error=one_line(why))


def _reason(error: Error) -> str:
    """The message of the exception that a client raised, fit for a log, without what Flower wraps it in."""
    text = ANSI.sub("", error.reason or f"Flower error {error.code}")
    text = text.rpartition(RAY_MARK)[2] if RAY_MARK in text else WRAPPING.sub(r"\1: ", text)
    return one_line(text.removesuffix("'>"))


def _checked_name(reply: Reply | None) -> str:
    """The name that a client gave itself, where it can stand in a log line."""
    return reply.client if reply and reply.client.isprintable() and len(reply.client) <= MAX_NAME else ""


def _blob_record(blob: bytes) -> ArrayRecord | ConfigRecord:
    """A blob as Flower's record: a small one is one object, a large one an Array, which is cut in pieces."""
    if len(blob) <= ONE_OBJECT:
        return ConfigRecord({"blob": blob})
    return ArrayRecord({"blob": Array("uint8", (len(blob),), BLOB_STYPE, blob)})


def _blob_bytes(record: object) -> bytes:
    if isinstance(record, ConfigRecord):
        blob = record.get("blob", b"")
        if not isinstance(blob, bytes):
            raise TypeError(f"the blob is {type(blob).__name__}, expected bytes")
        return blob
    if not isinstance(record, ArrayRecord):
        raise TypeError("the blob is neither an ArrayRecord nor a ConfigRecord")
    array = record["blob"]
    if array.stype != BLOB_STYPE:
        raise ValueError(f"the blob has stype {array.stype}, expected {BLOB_STYPE}")
    return array.data
