"""A small TCP balancer: new connections go to backends that are ready, by turns; those there are
stay where they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import weakref
from collections.abc import AsyncIterator, Sequence

ASK_EVERY_S = 0.1


class Balancer:
    """Listens on `port` once it runs. It never tries a second backend, so a connection that one
    refuses is lost.
    """

    def __init__(self, backends: Sequence[int]) -> None:
        self.port = 0
        self._backends = backends
        self._ready: set[int] = set()
        self._turn = itertools.count()
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        """Of every connection that is not let go of yet."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Balancer]:
        await asyncio.gather(*(self._ask(port) for port in self._backends))
        asking = [asyncio.create_task(self._keep_asking(port)) for port in self._backends]
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in (*asking, *self._pipes):
                task.cancel()
            await asyncio.gather(*asking, *self._pipes, return_exceptions=True)
            await asyncio.gather(*(close(writer) for writer in self._writers))

    async def ready(self, port: int, wanted: bool) -> None:
        """Waits until the balancer has seen that a backend is ready, or that it is not."""
        while (port in self._ready) != wanted:
            await asyncio.sleep(0.01)

    async def _keep_asking(self, port: int) -> None:
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            await self._ask(port)

    async def _ask(self, port: int) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: balancer\r\nConnection: close\r\n\r\n")
                ready = (await reader.read()).startswith(b"HTTP/1.1 200")
            finally:
                await close(writer)
        except OSError:
            ready = False
        (self._ready.add if ready else self._ready.discard)(port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        ready = sorted(self._ready)
        try:
            behind = await asyncio.open_connection(
                "127.0.0.1", ready[next(self._turn) % len(ready)]
            )
        except (OSError, ZeroDivisionError):
            writer.transport.abort()
            return
        self._writers.add(behind[1])
        for source, sink in ((reader, behind[1]), (behind[0], writer)):
            task = asyncio.create_task(pipe(source, sink))
            self._pipes.add(task)
            task.add_done_callback(self._pipes.discard)


async def close(writer: asyncio.StreamWriter) -> None:
    """Closes a connection and waits until it is gone: the loop may end behind it."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.close()
