"""Lets requests in: so many at a time, and none once the server drains."""

from __future__ import annotations

import asyncio

from nanovllm.entrypoints.server.problems import Problem

RETRY_AFTER_S = 1


class Gate:
    """Counts the requests that are inside. For one event loop.

    Args:
        most: requests that may be inside, running or waiting.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.is_draining = False

    def enter(self, count: int) -> None:
        """Lets `count` requests in; each `enter` is followed by one `leave`.

        Raises:
            Problem: there are too many (429), or the server drains (503).
        """
        if self.is_draining:
            raise Problem(503, "the server is stopping", code="stopping", headers={"Connection": "close"})
        if self._num_inside + count > self._most:
            message = f"{self._num_inside} requests are open, of at most {self._most}; try again later"
            raise Problem(429, message, code="queue_full", headers={"Retry-After": str(RETRY_AFTER_S)})
        self._num_inside += count
        self._empty.clear()

    def leave(self, count: int) -> None:
        """Takes back one `enter`."""
        self._num_inside -= count
        if not self._num_inside:
            self._empty.set()

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether all have left within this time."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True
