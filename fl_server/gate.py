"""The SuperLink's gate: who may ask for what on its one port, how much, and how often.

Flower's SuperLink serves three kinds of callers there. Nodes (`/v1/fleet/`) must prove that they have a key.
Operators (start a run, let a key in: `/v1/control/`) and its own child processes (`/v1/runtime/`) need prove
nothing: whoever reaches the port could let his own key in, or send code to every site. Behind this gate only
this machine may, and operators that are named by address.

A request of a node is held back from Flower until all of it is there and is of a size that nodes send: Flower
itself reads any length into memory, before it looks at the key. What is held back is bounded too, in
bytes and in seconds: it may come from anyone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from vblora.errors import raise_faults

__all__ = ["Gate", "GateSettings"]

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NODES, HEALTH = "/v1/fleet/", "/health"
MOST_BYTES = 8 << 20  # of a request of a node: Flower cuts blobs into pieces of 5 MiB
BODY_SECONDS = 300.0  # for all of a request to come: 8 MiB at 220 kbit/s
MOST_OF_PEER, MOST_OF_ALL = 256 << 20, 2 << 30  # bytes of nodes' requests in memory, by address and in all
LEAST_HELD = 64 << 10  # that a request counts in memory, however short
SPENT = "more than --requests or --megabytes allow; try again"
FULL = "too much of other requests is still coming in; try again"
BURST = 10.0  # seconds' worth of requests that may come at once
QUIET = 60.0  # seconds in which a refusal is not told again
MOST_PEERS = 10_000  # addresses that are remembered
CLOCK_HEADER = b"flwr-timestamp"  # when a node signed a request, by its own clock
AHEAD, BEHIND = 5.0, 300.0  # seconds that Flower lets a node's clock differ by; it refuses without a reason

log = logging.getLogger("flwr.fedvb")  # below Flower's logger, whose handlers show it


@dataclass(frozen=True)
class GateSettings:
    """Limits on what comes in.

    Attributes:
        operators: addresses or networks from which runs may be started and keys let in, beside this machine.
        requests: of nodes behind one address, a second on average; a node sends one every three seconds, and
            one for each 5 MiB of an update.
        megabytes: of nodes behind one address, a minute on average.
    """

    operators: Sequence[str] = ()
    requests: float = 50.0
    megabytes: float = 6000.0

    def __post_init__(self) -> None:
        raise_faults("server", self._faults())

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """`operators`, parsed."""
        return tuple(ip_network(given, strict=False) for given in self.operators)

    def _faults(self) -> Iterator[str]:
        for given in self.operators:
            try:
                ip_network(given, strict=False)
            except ValueError:
                yield f"--operators is {given!r:.60}, expected an address or a network such as 10.0.0.0/24"
        for name, least in (("requests", 1.0), ("megabytes", 60.0)):
            if not getattr(self, name) >= least:
                yield f"--{name} is {getattr(self, name):g}, expected at least {least:g}"


@dataclass
class _Budget:
    """What one address may still send: `amount` fills up at `rate` a second, to `most`."""

    rate: float
    most: float
    amount: float = field(init=False)
    seen: float = 0.0

    def __post_init__(self) -> None:
        self.amount = self.most

    def take(self, wanted: float, now: float) -> bool:
        """Spend, if there is anything left; a large request may overdraw, and is waited for."""
        self.amount = min(self.most, self.amount + (now - self.seen) * self.rate)
        self.seen = now
        if self.amount <= 0:
            return False
        self.amount -= wanted
        return True


class _Refused(Exception):
    """A request that is not passed on: the answer's code, and a sentence."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class _Room:
    """Bytes of requests that are in memory now, by address."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._all = 0

    @contextmanager
    def share(self, peer: str) -> Iterator[Callable[[int], bool]]:
        """What one request takes, until it is done with: a function that takes bytes, if there is room."""
        taken = 0

        def hold(size: int) -> bool:
            nonlocal taken
            if self._held[peer] + size > MOST_OF_PEER or self._all + size > MOST_OF_ALL:
                return False
            self._held[peer] += size
            self._all += size
            taken += size
            return True

        try:
            yield hold
        finally:
            self._held[peer] -= taken
            self._all -= taken
            if not self._held[peer]:
                del self._held[peer]


class Gate:
    """ASGI middleware in front of the SuperLink."""

    def __init__(self, app: App, settings: GateSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._settings = settings
        self._operators = settings.networks
        self._clock = clock
        self._budgets: dict[str, tuple[_Budget, _Budget]] = {}
        self._room = _Room()
        self._told: dict[tuple[str, str], float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"].startswith(NODES):
            await self._node(scope, receive, send)
        elif scope["path"] == HEALTH or self._is_operator(scope):
            await self._app(scope, receive, send)
        else:
            await self._refuse(
                scope, send, 403, "only the server's own machine may, and who fedvb server --operators names"
            )

    def _is_operator(self, scope: Scope) -> bool:
        """Whether a call comes from this machine, under any of its addresses, or from an operator's."""
        peer, here = (_address(scope.get(end)) for end in ("client", "server"))
        if peer is None:
            return False
        return peer.is_loopback or peer == here or any(peer in known for known in self._operators)

    async def _node(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request of a node on, once it is known to be no larger and no more frequent than allowed."""
        peer = (scope["client"] or ("unknown",))[0]
        with self._room.share(peer) as hold:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await self._body(scope, receive, self._budget(peer), hold)
            except TimeoutError:
                why = f"its body did not come within {BODY_SECONDS:g} seconds"
                await self._refuse(scope, send, 408, why)
                return
            except _Refused as refused:
                await self._refuse(scope, send, refused.code, str(refused))
                return
            if body is None:
                return
            self._look_at_clock(scope, peer)
            events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Event:
                return events.pop() if events else await receive()

            await self._app(scope, replay, send)

    async def _body(
        self, scope: Scope, receive: Receive, budget: tuple[_Budget, _Budget], hold: Callable[[int], bool]
    ) -> bytes | None:
        """All of a request, charged as it comes in; None where the caller has gone.

        Raises:
            _Refused: it is too large, or more than its address may send or the gate may hold.
        """
        requests, volume = budget
        if not requests.take(1, self._clock()) or not volume.take(0, self._clock()):
            raise _Refused(503, SPENT)
        if _declared(scope) > MOST_BYTES:
            raise _Refused(413, f"{_declared(scope)} bytes, expected {MOST_BYTES} at most")
        if not hold(LEAST_HELD):
            raise _Refused(503, FULL)
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            parts.append(event.get("body", b""))
            size, more = size + len(parts[-1]), event.get("more_body", False)
            if not volume.take(len(parts[-1]), self._clock()):
                raise _Refused(503, SPENT)
            if size > MOST_BYTES:
                raise _Refused(413, f"too many bytes, expected {MOST_BYTES} at most")
            if not hold(len(parts[-1])):
                raise _Refused(503, FULL)
        return b"".join(parts)

    def _budget(self, peer: str) -> tuple[_Budget, _Budget]:
        if peer not in self._budgets:
            if len(self._budgets) >= MOST_PEERS:
                self._budgets.pop(next(iter(self._budgets)))
            rate, volume = self._settings.requests, self._settings.megabytes * 1e6 / 60
            self._budgets[peer] = _Budget(rate, BURST * rate), _Budget(volume, 60 * volume)
        return self._budgets[peer]

    def _look_at_clock(self, scope: Scope, peer: str) -> None:
        """Say why Flower is about to turn a node away whose clock is wrong."""
        signed = dict(scope["headers"]).get(CLOCK_HEADER)
        if signed is None:
            return
        try:
            behind = (datetime.now(UTC) - datetime.fromisoformat(signed.decode())).total_seconds()
        except (ValueError, TypeError):  # not a time, or one without a zone: Flower refuses it too
            return
        if not -AHEAD < behind < BEHIND:
            told = f"{behind:.0f} s behind" if behind > 0 else f"{-behind:.0f} s ahead of"
            self._tell(peer, "clock", f"node at {peer}: its clock is {told} this one; set it, as with NTP")

    def _tell(self, peer: str, what: str, line: str) -> None:
        """Log a line, but not again within a minute."""
        told, now = self._told.get((peer, what)), self._clock()
        if told is None or now - told >= QUIET:
            if len(self._told) >= MOST_PEERS:
                self._told.clear()
            self._told[peer, what] = now
            log.warning("%s", line)

    async def _refuse(self, scope: Scope, send: Send, code: int, why: str) -> None:
        """Answer with a code and a sentence that Flower's command line shows; log it once a minute."""
        peer = (scope["client"] or ("unknown",))[0]
        self._tell(peer, str(code), f"refused {scope['path'][:80]!a} from {peer}: {why}")
        content = json.dumps({"detail": f"refused: {why}"}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        headers += [(b"connection", b"close")] + ([(b"retry-after", b"10")] if code == 503 else [])
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def _address(end: Sequence[Any] | None) -> IPv4Address | IPv6Address | None:
    """The address of one end of a connection; None where it has none, or a name."""
    try:
        found = ip_address((end or ("",))[0])
    except ValueError:
        return None
    # A socket that listens for both shows IPv4 callers as ::ffff:10.0.0.9.
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _declared(scope: Scope) -> int:
    """Content-Length; 0 without one."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else MOST_BYTES + 1
    return 0
