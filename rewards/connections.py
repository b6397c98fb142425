"""Connections of the reward server: their limits, and how it stops."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class Server(uvicorn.Server):
    """Serves ``rewards.server.app`` until SIGTERM or SIGINT.

    A client has ``headers`` seconds for the headers of its request, from when it connects or, on a
    connection in use, from their first byte; then it is disconnected. So is one that reads none of
    its answers for as long. A request by more than ``most`` connections gets 503.

    Told to stop, the server still answers what it has, for ``grace`` seconds; new requests get 503
    meanwhile, and so does what is not done then. A second SIGINT ends it at once.
    """

    def __init__(
        self,
        api: Any,
        host: str = "127.0.0.1",
        port: int = 8000,
        headers: float = 10.0,
        most: int = 64,
        grace: float = 30.0,
        **options: Any,
    ):
        class Protocol(PromptHeaders):
            seconds = headers

        # uvicorn counts the connection that asks, too
        options |= {"http": Protocol, "ws": "none", "limit_concurrency": most + 1}
        options |= {"access_log": False, "timeout_graceful_shutdown": 1}
        super().__init__(uvicorn.Config(api, host, port, **options))
        self.state, self.grace = api.state, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.state.stopping, end = True, time.monotonic() + self.grace
        while self.state.requests and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        for task in self.state.requests:
            task.cancel()
        await super().shutdown(sockets)  # sends the replies


class PromptHeaders(H11Protocol):
    """Closes a connection that has no whole request, nor an answer due, for too long, and one whose
    client does not read its answers."""

    seconds: float
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()
        self._read()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch(self) -> None:
        if self.cycle and not self.cycle.response_complete:
            self._forget()
        elif self._late is None:  # not put off by further bytes; uvicorn watches for none at all
            self._late = self.loop.call_later(self.seconds, self.timeout_keep_alive_handler)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
