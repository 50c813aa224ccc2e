"""Calls of an engine's public methods, from any thread, and the outputs on their way to them.

One call at a time runs the loop, for itself and for all others. However a call ends, an interrupt between any two of
its lines included, it blocks nobody and leaves no request behind that nobody waits for. Knows nothing of requests or
devices: no torch.
"""

from __future__ import annotations

import contextlib
import queue
import threading

from nanovllm.errors import EngineBusyError
from nanovllm.outputs import RequestOutput

MOST_WAIT_S = 0.1
"""A call that was interrupted between its last turn and its last line wakes nobody: the others look for themselves."""


class Call:
    """A call of a public method on its thread's stack, for as long as it is in `with call.on_stack:`.

    That is a lock of the interpreter's own, which `with` lets go of however the block ends: Python hears no signal
    between taking such a lock and the block, nor between the block and letting go.
    """

    def __init__(self) -> None:
        self.on_stack = threading.Lock()
        self.thread_id = threading.get_ident()

    @property
    def is_over(self) -> bool:
        return not self.on_stack.locked()


class Inbox:
    """Outputs of requests on their way to whoever waits for them.

    Args:
        call: the call that waits for them, and after which nobody does; None if others may come for them.

    Attributes:
        is_closed: whether nobody waits for them any more.
        request_ids: unfinished requests whose outputs come here; kept by the loop.
    """

    def __init__(self, call: Call | None = None) -> None:
        self.is_closed = False
        self.request_ids: set[int] = set()
        self._call = call
        # Reentrant, since a signal handler may use the engine while its thread is in here.
        self._lock = threading.RLock()
        self._outputs: list[RequestOutput] = []
        self._last_taken: list[RequestOutput] = []
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_listening = False

    def __bool__(self) -> bool:
        """Whether there is an output to take."""
        return bool(self._outputs)

    @property
    def is_abandoned(self) -> bool:
        return self.is_closed or (self._call is not None and self._call.is_over)

    def put(self, output: RequestOutput) -> None:
        with self._lock:
            self._outputs.append(output)
        if self._is_listening:
            self.ring()

    def has_got(self, output: RequestOutput) -> bool:
        """Whether `output` is here, or was among what was taken last."""
        with self._lock:
            return any(one is output for one in [*self._outputs, *self._last_taken])

    def take_all(self, outputs: list[RequestOutput]) -> None:
        """Moves all outputs into an empty list: one of the caller's, so that it can `put_back` if it is interrupted."""
        with self._lock:
            if self._outputs:
                outputs[:], self._outputs = self._outputs, []
                self._last_taken = list(outputs)

    def put_back(self, outputs: list[RequestOutput]) -> None:
        """Undoes `take_all`: the outputs have reached nobody."""
        with self._lock:
            self._outputs[:0] = outputs

    def pop(self) -> RequestOutput | None:
        """The oldest output, None if there is none."""
        with self._lock:
            if not self._outputs:
                return None
            self._last_taken = self._outputs[:1]
            return self._outputs.pop(0)

    def ring(self) -> None:
        """Wakes the call that waits."""
        if self._bell.empty():
            self._bell.put(None)

    def wait(self) -> None:
        """Until somebody rings, MOST_WAIT_S at most. A ring that came late ends the next wait at once."""
        self._is_listening = True
        if not self._outputs:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=MOST_WAIT_S)
        self._is_listening = False


class Turns:
    """Decides which call runs the loop: the one that has the turn; no other has it meanwhile."""

    def __init__(self) -> None:
        # Reentrant, since a signal handler may use the engine while its thread is in here.
        self._guard = threading.RLock()
        self._holder: Call | None = None
        self._waiting: dict[Inbox, None] = {}

    def take(self, call: Call) -> bool:
        """Gives `call` the turn if nobody has it, or only a call that is over; whether it has it now."""
        with self._guard:
            if self._holder is None or self._holder.is_over:
                self._holder = call
            return self._holder is call

    def end(self) -> None:
        """Gives the turn back."""
        self._holder = None

    def is_on_this_stack(self) -> bool:
        """Whether a call of this very thread has the turn: this is a signal handler, or the like, that broke in."""
        holder = self._holder
        return holder is not None and not holder.is_over and holder.thread_id == threading.get_ident()

    def wait(self, inbox: Inbox) -> None:
        """Waits until the inbox has an output, whoever has the turn leaves, or some time has passed.

        Raises:
            EngineBusyError: it would wait for itself.
        """
        if self.is_on_this_stack():
            raise EngineBusyError(
                "this thread is already within a call of the same engine (this is a signal handler, or a callback); "
                "from there add_request, abort and close may be called, which do not wait"
            )
        self._waiting[inbox] = None
        try:
            if self._holder is not None:
                inbox.wait()
        finally:
            self._waiting.pop(inbox, None)

    def wake_all(self) -> None:
        """Lets the calls that wait look around: the turn may be free, or the engine closed."""
        for inbox in list(self._waiting):
            inbox.ring()
