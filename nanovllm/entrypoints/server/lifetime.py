"""Runs the application until a signal or the end of the engine's process: drains, tells who is left, and stops."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from nanovllm.entrypoints.async_llm import AsyncLLM
from nanovllm.entrypoints.server.app import ServerSettings, make_app
from nanovllm.entrypoints.server.gate import Gate

logger = logging.getLogger(__name__)

TELL_TIMEOUT_S = 2
"""How long it may take to tell those who are left that there will be no answer."""


class Server(uvicorn.Server):
    """uvicorn's server, which on the first signal goes on until all requests are answered, or their time is up.

    Args:
        app: what it serves.
        llm: the engine, which is closed at the end.
        gate: is closed to new requests when it drains.
        shutdown_timeout_s: how long it may drain.

    Attributes:
        status: exit status of the process; 1 if the engine's process has ended.
    """

    def __init__(self, app: ASGIApp, llm: AsyncLLM, gate: Gate, shutdown_timeout_s: float) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing asks who the client is
            timeout_graceful_shutdown=TELL_TIMEOUT_S,
        )
        super().__init__(config)
        self.status = 0
        self._llm = llm
        self._gate = gate
        self._shutdown_timeout_s = shutdown_timeout_s
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one begins to drain, the second one stops at once."""
        self._loop.call_soon_threadsafe(self._drain_or_stop)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop, ten times a second."""
        if self._llm.death is not None and not self.should_exit:
            logger.error("%s", self._llm.death)
            self.status = 1
            self.should_exit = True
        return await super().on_tick(counter)

    def _drain_or_stop(self) -> None:
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        logger.info("draining, for at most %g s; another signal stops at once", self._shutdown_timeout_s)
        self._gate.is_draining = True
        if not await self._gate.wait_until_empty(self._shutdown_timeout_s):
            logger.warning("some requests have not ended within %g s", self._shutdown_timeout_s)
        closing = self._loop.create_task(self._llm.close())  # which ends them with an error
        await self._gate.wait_until_empty(TELL_TIMEOUT_S)
        self.should_exit = True
        await closing


async def serve(llm: AsyncLLM, settings: ServerSettings, listening: socket.socket, *, shutdown_timeout_s: float) -> int:
    """Serves on a socket until it is told to stop; the exit status."""
    gc.freeze()  # what is loaded stays: to look through it again and again would hold streams up
    await llm.metrics()  # the engine answers, and its end is noticed from here on
    gate = Gate(settings.max_open_requests)
    server = Server(make_app(llm, gate, settings), llm, gate, shutdown_timeout_s)
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"nanovllm serves {settings.model_name} at http://{address}:{port}\n")
    sys.stdout.flush()
    try:
        await server.serve(sockets=[listening])
    finally:
        await llm.close()
    return server.status
