"""Handoffs under way: sends the blocks that prefill steps complete, and notices which arrive, fail or are late."""

from __future__ import annotations

import time

from nanovllm.engine.execution.kv_transfer import KVTransfer
from nanovllm.engine.in_flight import Handoff, StepsInFlight
from nanovllm.engine.observer import Observer
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.runners import Runners
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.scheduling.step import PrefillChunk, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import HandoffError, HandoffTimeout
from nanovllm.utils.device import Event


class Handoffs:
    """All handoffs of one engine.

    Args:
        transfers: carry the blocks, each from one card to another.
        scheduler: is told of copies that touch a lease's blocks, and of blocks that have arrived.
        outputs: is told of requests that fail.
        observer: is told of handoffs.
        runners: tell whether an error means that a device is lost.
        steps: the steps in flight, for messages.
        timeout_s: seconds from the end of its prefill step after which a handoff fails.
    """

    def __init__(
        self,
        transfers: dict[tuple[Card, Card], KVTransfer],
        scheduler: Scheduler,
        outputs: OutputProcessor,
        observer: Observer,
        runners: Runners,
        steps: StepsInFlight,
        timeout_s: float,
    ) -> None:
        self.under_way: list[Handoff] = []
        self.transfers = transfers
        self._scheduler = scheduler
        self._outputs = outputs
        self._observer = observer
        self._runners = runners
        self._steps = steps
        self._timeout_s = timeout_s

    def __len__(self) -> int:
        return len(self.under_way)

    @property
    def is_stuck(self) -> bool:
        """Whether a handoff has timed out: nothing should wait for its copies, or for those queued behind them."""
        return any(handoff.timed_out for handoff in self.under_way)

    def awaited(self) -> list[Handoff]:
        return [handoff for handoff in self.under_way if not handoff.timed_out]

    def send(self, step: Step, after: Event) -> None:
        """Hands over the blocks that a step completes; copies wait for the step on the device."""
        for chunk in step.chunks:
            if not chunk.handoff:
                continue
            self._scheduler.hold(chunk.lease)
            try:
                handle = self.transfers[step.card, chunk.handoff_target].send(chunk.handoff, after)
            except Exception as error:  # noqa: BLE001 - a copy that cannot be launched fails its request alone
                self._runners.raise_if_lost(error)
                self._scheduler.release(chunk.lease)
                if chunk.seq.lease is chunk.lease:
                    about = self._observer.about_handoff(chunk.seq, step.card, chunk.handoff_target)
                    self._outputs.fail(chunk.seq, HandoffError(f"{about}: {error}"))
                continue
            num_tokens = len(chunk.handoff_tokens)
            self.under_way.append(
                Handoff(chunk.seq, chunk.lease, step, chunk.handoff_target, chunk.handoff, num_tokens, handle)
            )
            self._observer.handoff_sent(self.under_way[-1])

    def step_ended(self, step: Step) -> None:
        """Starts the timeout of the handoffs of a step that has ended."""
        for handoff in self.under_way:
            if handoff.step is step:
                handoff.computed_s = time.perf_counter()
                handoff.deadline_s = handoff.computed_s + self._timeout_s

    def collect(self) -> bool:
        """Takes in handoffs that have ended, and fails late ones. Returns whether that moved a request on."""
        has_progressed = False
        for handoff in list(self.under_way):
            if handoff.handle.is_done():
                self.under_way.remove(handoff)
                self._handoff_ended(handoff)
                has_progressed = True
            elif time.perf_counter() > handoff.deadline_s and not handoff.timed_out:
                handoff.timed_out = handoff.lease.stuck = True
                if handoff.seq.lease is handoff.lease:
                    self._outputs.fail(handoff.seq, HandoffTimeout(self._timeout_message(handoff)))
                    has_progressed = True
        return has_progressed

    def missed(self, chunk: PrefillChunk, layer: int) -> HandoffError:
        """The error of a chunk that has not waited any longer for the KV of a layer, which another card computes."""
        return HandoffError(
            f"request {chunk.seq.request_id}: the KV of layer {layer} of the tokens before {chunk.start} has not come "
            f"from {chunk.handoff_target} to {chunk.allocation.card} in time: handoff_timeout_s={self._timeout_s}, "
            "or half of step_timeout_s if that is less"
        )

    def fail_waiting(self, seq: Sequence) -> None:
        """Ends a request that waits for blocks of a handoff that never ends."""
        assert self.under_way, f"request {seq.request_id} waits for nothing that will ever happen"
        message = f"request {seq.request_id} waits for blocks that a handoff without end holds"
        error = HandoffTimeout(f"{message}: {self._timeout_message(self.under_way[0])}")
        self._outputs.finish(seq, "error", error=error)

    def forget(self) -> list[Lease]:
        """Forgets all handoffs, after an interrupt, unless one is stuck: then copies may still write to their blocks.

        Returns the leases of those handoffs, one entry for each.
        """
        # Copies queued behind a stuck one may still write to their blocks.
        self.under_way = self.under_way if self.is_stuck else []
        for handoff in self.under_way:
            handoff.timed_out = handoff.lease.stuck = True
        return [handoff.lease for handoff in self.under_way]

    def drop(self) -> list[Handoff]:
        """Forgets and returns all handoffs: nobody will collect them."""
        dropped, self.under_way = self.under_way, []
        return dropped

    def _handoff_ended(self, handoff: Handoff) -> None:
        error = None
        try:
            handoff.handle.wait()
        except Exception as raised:  # noqa: BLE001 - whatever went wrong on the way fails this request alone
            self._runners.raise_if_lost(raised)
            error = HandoffError(f"{self._about(handoff)}: {raised}")
        self._observer.handoff_ended(handoff, arrived=error is None)
        if error is None:
            self._scheduler.blocks_arrived(handoff.lease)
        else:
            for allocation in handoff.lease.allocations:
                allocation.card.block_manager.forget(allocation.blocks)
            self._scheduler.release(handoff.lease)
            if handoff.seq.lease is handoff.lease:
                self._outputs.fail(handoff.seq, error)

    def _about(self, handoff: Handoff) -> str:
        return self._observer.about_handoff(handoff.seq, handoff.source, handoff.target)

    def _timeout_message(self, handoff: Handoff) -> str:
        cards = (handoff.source, handoff.target)
        source_state, target_state = (
            f"{card.block_manager.num_held_blocks} of {card.block_manager.num_blocks} blocks held" for card in cards
        )
        return (
            f"{self._about(handoff)}: {len(handoff.pairs)} blocks, from {handoff.pairs[0][0]} to "
            f"{handoff.pairs[0][1]} on, have not arrived within handoff_timeout_s={self._timeout_s}; "
            f"{handoff.source}: {source_state}; {handoff.target}: {target_state}; handoffs under way: {len(self)}; "
            f"steps in flight: {len(self._steps)}. The blocks stay held until the copy ends"
        )
