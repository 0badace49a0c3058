"""A small TCP load balancer for tests of rolling updates.

New connections go to the backends that are ready, in turn. Open connections stay where they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import weakref
from collections.abc import AsyncIterator, Sequence

PROBE_INTERVAL_S = 0.1


class Balancer:
    """A balancer that listens on `port` while it runs.

    It never tries a second backend, so a connection that the first one refuses is lost.
    """

    def __init__(self, backends: Sequence[int]) -> None:
        self.port = 0
        self._backends = backends
        self._ready: set[int] = set()
        self._turn = itertools.count()
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        """Writers of the connections that are not garbage-collected yet."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Balancer]:
        """Run the balancer for the length of the block."""
        await asyncio.gather(*(self._probe(port) for port in self._backends))
        probes = [asyncio.create_task(self._probe_forever(port)) for port in self._backends]
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in (*probes, *self._pipes):
                task.cancel()
            await asyncio.gather(*probes, *self._pipes, return_exceptions=True)
            await asyncio.gather(*(close(writer) for writer in self._writers))

    async def wait_until_ready(self, port: int, is_ready: bool) -> None:
        """Wait until the balancer has seen that a backend is ready, or that it is not."""
        while (port in self._ready) != is_ready:
            await asyncio.sleep(0.01)

    async def _probe_forever(self, port: int) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            await self._probe(port)

    async def _probe(self, port: int) -> None:
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
            backend_reader, backend_writer = await asyncio.open_connection(
                "127.0.0.1", ready[next(self._turn) % len(ready)]
            )
        except (OSError, ZeroDivisionError):
            writer.transport.abort()
            return
        self._writers.add(backend_writer)
        for source, sink in ((reader, backend_writer), (backend_reader, writer)):
            task = asyncio.create_task(pipe(source, sink))
            self._pipes.add(task)
            task.add_done_callback(self._pipes.discard)


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a connection and wait until it is closed, because the event loop may end next."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copy bytes from one connection to another until either ends."""
    try:
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.close()
