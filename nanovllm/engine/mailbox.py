"""What calls have asked of the loop and it has not taken in yet. Each post is one operation, done or not done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanovllm.engine.callers import Inbox
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.text.request_text import RequestText


@dataclass(frozen=True)
class NewRequest:
    """A request, what turns its tokens into text, and where its outputs go."""

    seq: Sequence
    text: RequestText
    inbox: Inbox


@dataclass(frozen=True)
class Abort:
    """A request to end where it is; nobody is told of its end if nobody knows its id."""

    seq: Sequence
    is_known: bool


class Mailbox:
    """Posts of calls in any thread, which the loop reads at the beginning of a turn.

    A post is taken out only after it has been acted on: what an interrupt breaks off is acted on once more.
    """

    def __init__(self) -> None:
        self.arrived: deque[NewRequest] = deque()
        self.aborts: deque[Abort] = deque()
        self.aborting: set[Sequence] = set()
        """Requests that callers have aborted and that are still to be ended."""
        self.early_aborts: dict[int, Abort] = {}
        """Aborts, by request id, of requests that have not been taken in yet; kept by the loop."""
        self.closed_inboxes: deque[Inbox] = deque()

    def find(self, request_id: int) -> Sequence | None:
        """The request of this id, if it has not been taken in."""
        return next((new.seq for new in list(self.arrived) if new.seq.request_id == request_id), None)

    def clear(self) -> None:
        for posts in (self.arrived, self.aborts, self.aborting, self.early_aborts, self.closed_inboxes):
            posts.clear()
