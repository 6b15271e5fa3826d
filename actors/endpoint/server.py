"""Serves an application on the loopback address inside a running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from common.errors import RunError, UserError

_STARTED_S, _STOPPED_S = 30.0, 10.0
_LOOK_S = 0.02


class _Quiet(uvicorn.Server):
    """A server that leaves the process's signals to whoever has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class LoopbackServer:
    """A server with a port of its own. Start it with `await LoopbackServer.start(app)`."""

    def __init__(self, server: _Quiet, task: asyncio.Task[None], port: int) -> None:
        self._server = server
        self._task = task
        self.url = f"http://127.0.0.1:{port}/v1"

    @classmethod
    async def start(
        cls, app: Any, port: int = 0, listener: socket.socket | None = None
    ) -> LoopbackServer:
        """Serve `app`.

        Args:
            port: of loopback; 0 takes a free one.
            listener: where to serve instead, a socket that listens already.

        Raises:
            UserError: the port cannot be had.
            RunError: the server did not start in time.
        """
        listener = _listening(port) if listener is None else listener
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
        server = _Quiet(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(_STARTED_S):
                while not server.started and not task.done():
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError as error:
            task.cancel()
            raise RunError(f"the endpoint did not start within {_STARTED_S:.0f} s") from error
        return cls(server, task, listener.getsockname()[1])

    async def stop(self) -> None:
        """Take no call more and end those under way."""
        self._server.should_exit = True
        _, pending = await asyncio.wait([self._task], timeout=_STOPPED_S)
        for task in pending:
            task.cancel()


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # before the address is told: who asks at once waits, not fails
    except OSError as error:
        listener.close()
        raise UserError(f"port {port} of loopback cannot be had: {error.strerror}") from error
    return listener
