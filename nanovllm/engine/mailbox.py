"""Requests and aborts that calls have posted and the loop has not taken in yet. A post is one atomic operation."""

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
    """Asks the loop to abort a request. If `is_known` is False, no caller has its id, and nobody is told."""

    seq: Sequence
    is_known: bool


class Mailbox:
    """Posts of calls in any thread, which the loop reads at the beginning of a turn.

    A post is removed only after it was acted on: if an interrupt breaks that off, the loop acts on it again.
    """

    def __init__(self) -> None:
        self.arrived: deque[NewRequest] = deque()
        self.aborts: deque[Abort] = deque()
        self.aborting: set[Sequence] = set()
        """Requests whose abort is posted and not acted on yet."""
        self.early_aborts: dict[int, Abort] = {}
        """Aborts, by request id, of requests that have not been taken in yet; kept by the loop."""
        self.closed_inboxes: deque[Inbox] = deque()

    def find(self, request_id: int) -> Sequence | None:
        """The request of this id, if it has not been taken in."""
        return next((new.seq for new in list(self.arrived) if new.seq.request_id == request_id), None)

    def clear(self) -> None:
        for posts in (self.arrived, self.aborts, self.aborting, self.early_aborts, self.closed_inboxes):
            posts.clear()
