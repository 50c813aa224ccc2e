"""A block of a coroutine that a callback cuts short, for limits of time and clients that leave."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Cut:
    """A `with` block of one task, which `strike` ends where it waits. Takes no task of its own.

    Attributes:
        has_struck: whether it was ended so.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self.has_struck = False

    def strike(self, _: object = None) -> None:
        """Ends the block, unless it is over. A callback: of the task itself nothing runs meanwhile."""
        if self._task is not None and not self.has_struck:
            self.has_struck = True
            self._task.cancel()

    def __enter__(self) -> Cut:
        self._task = asyncio.current_task()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        if not self.has_struck or kind is not asyncio.CancelledError:
            return False
        # From Python 3.11 on a task counts who has cancelled it: another one's wish is passed on.
        uncancel = getattr(task, "uncancel", None)
        return uncancel is None or uncancel() == 0
