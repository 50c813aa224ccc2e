"""Calls of an engine's public methods, from any thread, and the outputs on their way to them.

One call at a time runs the loop, for itself and for all others. However a call ends, even by an interrupt, it blocks
nobody and leaves no request behind that nobody waits for. There are no locks to wait for: a signal handler may strike
anywhere, and use the engine. Every change is one operation of the interpreter. Knows nothing of requests or devices.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections import deque

from nanovllm.engine.output_rows import OutputRows
from nanovllm.errors import EngineBusyError
from nanovllm.outputs import RequestOutput

MAX_WAIT_S = 0.1
"""Maximum sleep of a waiting call before it checks again: a call that was interrupted may have woken nobody."""


class Call:
    """A call of a public method on its thread's stack, for as long as it is in `with call.on_stack:`.

    `on_stack` is a lock of the interpreter's own, which `with` releases however the block ends: Python runs no signal
    handler between acquiring such a lock and the block, nor between the block and the release. No thread ever waits
    for this lock.
    """

    def __init__(self) -> None:
        self.on_stack = threading.Lock()
        self.thread_id = threading.get_ident()
        self._process_id = os.getpid()

    @property
    def is_over(self) -> bool:
        # A process that was forked has the locks, but not the threads, of its parent.
        return not self.on_stack.locked() or self._process_id != os.getpid()


class Inbox:
    """Outputs of requests on their way to the call that waits for them.

    Args:
        call: the call that waits for them, and after which nobody does; None if others may come for them.

    Attributes:
        is_closed: whether nobody waits for them any more.
        request_ids: unfinished requests whose outputs come here; kept by the loop.
        outputs: those that have come and nobody has taken, some of them many at once.
    """

    def __init__(self, call: Call | None = None) -> None:
        self.is_closed = False
        self.request_ids: set[int] = set()
        self._call = call
        self.outputs: deque[RequestOutput | OutputRows] = deque()
        self._last_put: deque[RequestOutput | OutputRows] = deque(maxlen=1)
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __bool__(self) -> bool:
        """Whether there is an output to take."""
        return bool(self.outputs)

    @property
    def is_abandoned(self) -> bool:
        return self.is_closed or (self._call is not None and self._call.is_over)

    def put(self, output: RequestOutput) -> None:
        """Adds an output; `was_put_last` tells whether that was done, should an interrupt strike here."""
        # Both in one operation of the interpreter, which an interrupt finds done or not done.
        queues: tuple[deque[RequestOutput | OutputRows], ...] = (self.outputs, self._last_put)
        deque(map(deque.append, queues, (output, output)), maxlen=0)
        self.ring()

    def was_put_last(self, output: RequestOutput) -> bool:
        """Whether `output` is the last one that was put here, taken since or not."""
        return bool(self._last_put) and self._last_put[0] is output

    def take_all(self, outputs: list[RequestOutput | OutputRows]) -> None:
        """Moves all outputs to the end of a list, the caller's, so that it can `put_back` if it is interrupted."""
        with contextlib.suppress(IndexError):  # another thread was faster
            outputs.extend(itertools.starmap(self.outputs.popleft, itertools.repeat((), len(self.outputs))))

    def put_back(self, outputs: list[RequestOutput | OutputRows]) -> None:
        """Undoes `take_all`: the outputs have reached nobody."""
        self.outputs.extendleft(reversed(outputs))

    def pop(self) -> RequestOutput | None:
        """The oldest output, None if there is none. Of an inbox of one request, whose outputs come one by one."""
        try:
            output = self.outputs.popleft()
        except IndexError:
            return None
        assert isinstance(output, RequestOutput), "rows are of several requests"
        return output

    def ring(self) -> None:
        """Wakes a call that waits."""
        if self._bell.empty():
            self._bell.put(None)

    def wait(self) -> None:
        """Waits until somebody rings, MAX_WAIT_S at most. A ring that came late ends the next wait at once."""
        if not self.outputs:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=MAX_WAIT_S)


class _Turn:
    """One turn of one call at the loop. Turns follow each other as links of a chain."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.has_ended = False
        self._next: dict[str, _Turn] = {}

    @property
    def is_over(self) -> bool:
        return self.has_ended or self.call.is_over

    @property
    def next(self) -> _Turn | None:
        return self._next.get("turn")

    def followed_by(self, turn: _Turn) -> _Turn:
        """The turn after this one, which is `turn` if there was none."""
        return self._next.setdefault("turn", turn)


class Turns:
    """Decides which call runs the loop: the one whose turn it is, until it ends the turn or is over."""

    def __init__(self) -> None:
        first = _Turn(Call())  # of a call that is not on any stack
        self._known = first
        """A turn from which on the chain is followed: the last one, or one before it."""
        self._waiting: dict[Call, Inbox] = {}

    def take(self, call: Call) -> bool:
        """Begins a turn of `call` if no other call has the turn. Returns whether it began."""
        mine = _Turn(call)
        last = self._last()
        if not last.is_over or last.followed_by(mine) is not mine:
            return False
        self._known = mine
        return True

    def end(self, call: Call) -> None:
        """Ends the turn of `call`, if it has the turn."""
        last = self._last()
        if last.call is call:
            last.has_ended = True

    def is_on_this_stack(self) -> bool:
        """Whether a call of this very thread has the turn: this is a signal handler, or the like, that broke in."""
        last = self._last()
        return not last.is_over and last.call.thread_id == threading.get_ident()

    @property
    def is_awaited(self) -> bool:
        """Whether a call waits for outputs, or for the turn."""
        return bool(self._waiting)

    def wait(self, call: Call, inbox: Inbox) -> None:
        """Waits until somebody wakes this call, MAX_WAIT_S at most.

        Raises:
            EngineBusyError: it would wait for itself.
        """
        if self.is_on_this_stack():
            raise EngineBusyError(
                "this thread is already within a call of the same engine (this is a signal handler, or a callback); "
                "from there only methods may be called that do not wait for outputs, such as add_request and abort"
            )
        self._waiting[call] = inbox
        try:
            if not self._last().is_over:
                inbox.wait()
        finally:
            self._waiting.pop(call, None)

    def wake_all(self) -> None:
        """Wakes all waiting calls: there may be outputs, the turn may be free, or the engine closed."""
        for inbox in list(self._waiting.values()):
            inbox.ring()

    def _last(self) -> _Turn:
        turn = self._known
        while (following := turn.next) is not None:
            turn = following
        return turn
