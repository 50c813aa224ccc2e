"""What the scheduler knows of one device: its KV pool, the limit of a step, whether it works. No torch.

`Runners` has the runner of each card.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduling.circuit_breaker import CircuitBreaker
from nanovllm.engine.scheduling.step_time import StepTimeModel

MAX_FAILURES_IN_A_ROW = 2
"""Failures in a row that may be the fault of the requests; more are the card's."""


@dataclass(eq=False)
class Card:
    """One device, or the ranks that compute one model together.

    Attributes:
        name: name in messages, such as `cuda:1`.
        label: name in a trace, such as `decode device cuda:1`.
        block_manager: accounts for the blocks of the device's KV pool.
        max_prefill_tokens: maximum number of prompt tokens in a step, beside decode rows; for more is no workspace.
        breaker: whether the card is used for work that another card can do instead.
        step_time: predicts how long steps take there.
        is_up: whether its process is there and ready; always so for a card of this process.
    """

    name: str
    label: str
    block_manager: BlockManager
    max_prefill_tokens: int
    breaker: CircuitBreaker = field(default_factory=lambda: CircuitBreaker(MAX_FAILURES_IN_A_ROW))
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    is_up: bool = True

    def __str__(self) -> str:
        return self.name
