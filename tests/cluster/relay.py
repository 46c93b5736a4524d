"""What stands between a client and a member's socket, and can lose what passes."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from cluster.etcd import Etcd
from tests.cluster.loop import connected


class Relay:
    """Use it as an asynchronous context manager, in the loop of the client."""

    def __init__(self, target: str) -> None:
        """`target`: an endpoint such as EtcdCluster.sockets has."""
        self._target = target.removeprefix("unix:")
        self._directory = tempfile.TemporaryDirectory(prefix="relay-")
        self._path = f"{self._directory.name}/relay"
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_cut = False
        self._silent: set[asyncio.StreamWriter] = set()
        self._is_silent = False
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._directory.cleanup()

    @property
    def endpoint(self) -> str:
        return f"unix:{self._path}"

    def cut(self) -> None:
        """Breaks all connections; new ones are broken, too."""
        self._is_cut = True
        for writer in tuple(self._writers):
            writer.transport.abort()

    def heal(self) -> None:
        self._is_cut = False

    def silence(self, *, for_good: bool = False) -> None:
        """What is asked on the connections of now (`for_good`: and later) still arrives; no answer comes back."""
        self._silent |= self._writers
        self._is_silent = for_good

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        self.connections += 1
        back, forth = await asyncio.open_unix_connection(self._target)
        self._writers |= {writer, forth}
        tasks = {asyncio.create_task(self._pass(reader, forth)), asyncio.create_task(self._pass(back, writer, writer))}
        self._tasks |= tasks
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, forth):
            end.transport.abort()
        self._writers -= {writer, forth}

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: asyncio.StreamWriter | None = None
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if answers is None or not (self._is_silent or answers in self._silent):
                    writer.write(data)
                    await writer.drain()


@contextlib.asynccontextmanager
async def relayed(endpoints: tuple[str, ...], prefix: str) -> AsyncIterator[tuple[Relay, Etcd, Etcd]]:
    """A relay to the first endpoint, a client behind it, and one that it does not concern."""
    async with (
        Relay(endpoints[0]) as relay,
        connected(endpoints, prefix) as beside,
        connected((relay.endpoint,), prefix) as behind,
    ):
        yield relay, behind, beside
