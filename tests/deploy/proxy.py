"""A TCP proxy between node and server that counts what passes, and can be as slow as a thin line."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from types import TracebackType

__all__ = ["Proxy"]

CHUNK = 16384


class Proxy:
    """Passes connections on to a port of this machine, in a thread of its own. A context manager.

    Args:
        server: port to pass on to.
        bits: a second, each way, over all connections; 0 is no limit.
        delay: seconds that each piece is late, each way.

    Attributes:
        port: to connect to.
        up, down: bytes towards the server, and back.
    """

    def __init__(self, server: int, bits: float = 0, delay: float = 0) -> None:
        self.up = self.down = 0
        self.port = 0
        self._server, self._bits, self._delay = server, bits, delay
        self._free = {"up": 0.0, "down": 0.0}  # when each direction has sent all that it took
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = listening.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        listening.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._server)
        with suppress(asyncio.CancelledError):  # the proxy ends
            await asyncio.gather(self._pass(reader, back, "up"), self._pass(there, writer, "down"))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)

        async def take() -> None:
            while True:
                try:
                    piece = await source.read(CHUNK)
                except OSError:
                    piece = b""
                setattr(self, way, getattr(self, way) + len(piece))
                now = time.monotonic()
                self._free[way] = max(now, self._free[way])
                if self._bits:
                    self._free[way] += 8 * len(piece) / self._bits
                await pieces.put((self._free[way] + self._delay, piece))
                if not piece:
                    return
                if self._bits:  # no more than what the line can carry is on its way
                    await asyncio.sleep(max(0.0, self._free[way] - now))

        async def give() -> None:
            try:
                while True:
                    due, piece = await pieces.get()
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    if not piece:
                        break
                    sink.write(piece)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(take(), give())
