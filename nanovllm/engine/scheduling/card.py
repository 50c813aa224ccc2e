"""What decisions know of one device: its KV pool, what a step there may hold, whether it works. No torch.

Whatever runs on the device is looked up by its card.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduling.circuit_breaker import CircuitBreaker

MAX_FAILURES_IN_A_ROW = 2
"""Failures in a row that may be the requests' own fault; more are the card's."""


@dataclass(eq=False)
class Card:
    """One device, or the ranks that compute one model together.

    Attributes:
        name: how messages name it, such as `cuda:1`.
        label: how a trace names it, such as `decode device cuda:1`.
        block_manager: accounts for the blocks of the device's KV pool.
        max_prefill_tokens: maximum number of prompt tokens in a step; the device has workspace for no more.
        breaker: whether it is used for what another card can do in its place.
    """

    name: str
    label: str
    block_manager: BlockManager
    max_prefill_tokens: int
    breaker: CircuitBreaker = field(default_factory=lambda: CircuitBreaker(MAX_FAILURES_IN_A_ROW))

    def __str__(self) -> str:
        return self.name
