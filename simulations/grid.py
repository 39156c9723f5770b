"""Flower's grid in one process: virtual nodes without Ray, servers or sockets.

grid = InProcessGrid(one_by_one(client_app), nodes=20, run_config=run_config)
run_server_app(server_app, grid, run_config)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice

from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

# Private to Flower, and without a public counterpart in 1.41: a Message cannot be made before these are set.
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fl_server.observer import Observer
from vblora.errors import FedVBError, RunError

__all__ = ["Handle", "InProcessGrid", "one_by_one", "run_server_app"]

# Answers messages of one type, each with the context of its node. May be lazy: replies are taken as they come
Handle = Callable[[list[Message], list[Context]], Iterable[Message]]
RunConfig = Mapping[str, UserConfigValue]

SERVER_NODE = 1  # what Flower's SuperLink calls itself; virtual nodes are numbered from the next
RUN_ID = 1
AT_ONCE = 64  # replies held at a time
CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NO_REPLY = 4  # flwr.common.constant.ErrorCode.REPLY_MESSAGE_UNAVAILABLE


class InProcessGrid(Grid):
    """N virtual nodes behind one function.

    `handle` gets all messages of one type that a push holds, in their order, so that it can train a whole
    round as one cohort. It runs while replies are pulled. A `FedVBError` becomes an error reply of the
    message that caused it: where several were handled together, those not yet answered are handled again,
    one at a time. A message left without a reply gets an error reply, so nobody waits for it. A `RunError`
    concerns the run, not a client: it goes through, as every other exception does.

    Attributes:
        observer: of the rounds, for the server app to find; None lets it log.
    """

    in_process = True  # nobody who is missing comes back

    def __init__(
        self,
        handle: Handle,
        nodes: int,
        run_config: RunConfig | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.observer = observer
        self._handle = handle
        self._nodes = nodes
        self._run_config = dict(run_config or {})
        self._contexts: dict[int, Context] = {}
        self._numbers = count(1)
        self._waiting: dict[str, Message] = {}  # pushed, not yet handed to `handle`
        self._open: set[str] = set()  # in the hands of `handle`
        self._replies: Iterator[Message] = iter(())
        self.set_run(Run.create_empty(RUN_ID))

    def set_run(self, run: Run) -> None:
        """Set the run, and the identity with which this process makes messages."""
        self._run = run
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = run.run_id
        TaskIdentity.node_id = SERVER_NODE

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message. Flower has deprecated this; call `Message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes: they are there from the start."""
        return range(SERVER_NODE + 1, SERVER_NODE + 1 + self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        pushed = []
        for message in messages:
            name = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = name  # as Flower's own grids do
            self._waiting[name] = message
            pushed.append(name)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the nodes work, and return the next few replies to `message_ids`; none when all were given.

        Messages whose replies nobody pulls are not worked on; a group that is no longer asked for is dropped.
        """
        wanted = set(message_ids)
        if self._open.isdisjoint(wanted):
            self._start(wanted)
        replies = list(islice(self._replies, AT_ONCE))
        self._open.difference_update(reply.metadata.reply_to_message_id for reply in replies)
        return [reply for reply in replies if reply.metadata.reply_to_message_id in wanted]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return all replies. `timeout` is ignored: there is always a reply."""
        open_ids = set(self.push_messages(messages))
        found: list[Message] = []
        while open_ids:
            replies = list(self.pull_messages(open_ids))
            open_ids.difference_update(reply.metadata.reply_to_message_id for reply in replies)
            found += replies
        return found

    def context(self, node: int) -> Context:
        """The context of a node: made when first asked for, kept for the whole run."""
        if node not in self._contexts:
            place: dict[str, UserConfigValue] = {
                "partition-id": node - SERVER_NODE - 1,
                "num-partitions": self._nodes,
            }
            self._contexts[node] = Context(RUN_ID, node, place, RecordDict(), self._run_config)
        return self._contexts[node]

    def _start(self, wanted: set[str]) -> None:
        """Hand over the first of the wanted messages and all others of its type."""
        names = [name for name in self._waiting if name in wanted]
        types = {name: self._waiting[name].metadata.message_type for name in names}
        group = {name: self._waiting.pop(name) for name in names if types[name] == types[names[0]]}
        self._open = set(group)
        self._replies = self._answers(group)

    def _answers(self, group: dict[str, Message]) -> Iterator[Message]:
        """Exactly one reply to every message of `group`, which is emptied on the way."""
        try:
            for reply in self._handled(list(group.values())):
                if group.pop(reply.metadata.reply_to_message_id, None) is not None:
                    yield reply
        except FedVBError as error:
            if isinstance(error, RunError) or not group:
                raise
            if len(group) == 1:
                (message,) = group.values()
                group.clear()
                yield Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)
            for name in list(group):
                yield from self._answers({name: group.pop(name)})
        for message in group.values():
            yield Message(Error(NO_REPLY, "the client gave no reply"), reply_to=message)

    def _handled(self, messages: list[Message]) -> Iterable[Message]:
        return self._handle(messages, [self.context(message.metadata.dst_node_id) for message in messages])


def one_by_one(client_app: ClientApp) -> Handle:
    """A handle that calls a ClientApp for one message after another."""

    def handle(messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        return (client_app(message, context) for message, context in zip(messages, contexts, strict=True))

    return handle


def run_server_app(server_app: ServerApp, grid: InProcessGrid, run_config: RunConfig) -> None:
    """Call a ServerApp as Flower would. What it raises comes out unchanged."""
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config)))
