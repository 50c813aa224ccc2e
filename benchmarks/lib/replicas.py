"""Which of several engines in processes of their own takes each request of a load, as by a router before them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from multiprocessing.context import SpawnContext

from lib.loads import Request
from lib.traces import TOKENS_PER_HASH_ID

NOBODY = 0
"""In the list of owners; replica r is r + 1."""


class Decisions:
    """What all replicas know: how much each has to do, and who takes which request. In memory that processes share.

    Args:
        context: of the processes.
        num_replicas: how many there are.
        most_requests: of a load.
    """

    def __init__(self, context: SpawnContext, num_replicas: int, most_requests: int) -> None:
        self.num_replicas = num_replicas
        self.owners = context.RawArray("b", most_requests)
        self.prompt_tokens = context.RawArray("q", num_replicas)
        """By replica: prompt tokens of requests that have no first token."""
        self.context_tokens = context.RawArray("q", num_replicas)
        """By replica: tokens of requests that have one."""
        self.lock = context.Lock()

    def begin_load(self) -> None:
        """Forgets the requests of the load before."""
        for number in range(len(self.owners)):
            self.owners[number] = NOBODY


class ReplicaRouter:
    """Says whether one of the replicas takes a request: the one with the longest beginning of its prompt in its cache,
    if prompts share beginnings; of those the one with the fewest prompt tokens to compute, then with the least context.

    Whichever replica first sees that a request is due decides, for all. Each asks about all requests, in order.

    Args:
        decisions: shared by the replicas.
        replica: its number.
        requests: of the load.
        by_prefix: whether prompts share beginnings.
    """

    def __init__(
        self, decisions: Decisions, replica: int, requests: Sequence[Request], *, by_prefix: bool = False
    ) -> None:
        self._decisions = decisions
        self._replica = replica
        self._lengths = [len(request.prompt) for request in requests]
        self._beginnings = [beginnings_of(request.prompt) if by_prefix else [] for request in requests]
        self._num_asked = 0
        self._seen: list[set[int]] = [set() for _ in range(decisions.num_replicas)]
        """By replica: the beginnings of the prompts that it has taken."""

    def takes(self, number: int) -> bool:
        """Whether the replica takes this request, the one after the last that was asked about."""
        decisions, beginnings = self._decisions, self._beginnings[number]
        with decisions.lock:
            if decisions.owners[number] == NOBODY:
                owner = min(range(decisions.num_replicas), key=lambda replica: self._rank(replica, beginnings))
                decisions.owners[number] = owner + 1
                decisions.prompt_tokens[owner] += self._lengths[number]
            owner = decisions.owners[number] - 1
        self._num_asked = number + 1
        self._seen[owner].update(beginnings)
        return owner == self._replica

    def _rank(self, replica: int, beginnings: list[int]) -> tuple[int, int, int]:
        num_cached = sum(1 for _ in itertools.takewhile(self._seen[replica].__contains__, beginnings))
        decisions = self._decisions
        return -num_cached, decisions.prompt_tokens[replica], decisions.context_tokens[replica]

    def has_to_do(self, running: Sequence[Request]) -> None:
        """Tells how much the replica has to do, by the requests that it has taken and that have not ended."""
        waiting = sum(len(request.prompt) for request in running if not request.token_times_s)
        decoding = sum(len(request.prompt) + request.num_tokens for request in running if request.token_times_s)
        decisions, number = self._decisions, self._num_asked
        with decisions.lock:
            # Another replica may have decided for this one what it has not asked about.
            while number < len(self._lengths) and decisions.owners[number] != NOBODY:
                waiting += self._lengths[number] if decisions.owners[number] == self._replica + 1 else 0
                number += 1
            decisions.prompt_tokens[self._replica] = waiting
            decisions.context_tokens[self._replica] = decoding


def beginnings_of(prompt: Sequence[int]) -> list[int]:
    """A hash of each beginning of the prompt, in steps of TOKENS_PER_HASH_ID tokens; the same in all processes."""
    hashes, so_far = [], 0
    for end in range(TOKENS_PER_HASH_ID, len(prompt) + 1, TOKENS_PER_HASH_ID):
        so_far = hash((so_far, *prompt[end - TOKENS_PER_HASH_ID : end]))  # numbers hash alike everywhere
        hashes.append(so_far)
    return hashes
