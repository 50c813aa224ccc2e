"""Handoffs under way: sends the blocks that prefill steps complete, and notices what has arrived, failed or is late."""

from __future__ import annotations

import time
from collections.abc import Callable

from nanovllm.engine.execution.kv_transfer import KVTransfer
from nanovllm.engine.in_flight import Handoff, StepsInFlight
from nanovllm.engine.observer import Observer
from nanovllm.engine.scheduler import PrefillStep, Scheduler
from nanovllm.engine.sequence import Lease, Sequence, SequenceStatus
from nanovllm.errors import HandoffError, HandoffTimeout
from nanovllm.utils.device import Event


class Handoffs:
    """All handoffs of one engine.

    Args:
        transfer: carries the blocks.
        scheduler: is told of what holds a lease, and of what has arrived.
        observer: is told of handoffs.
        steps: those in flight, for messages.
        timeout_s: seconds after the end of its prefill step at which a handoff fails.
        fail: ends or retries one request.
        raise_if_lost: raises if an error means that a device is lost.
    """

    def __init__(
        self,
        transfer: KVTransfer,
        scheduler: Scheduler,
        observer: Observer,
        steps: StepsInFlight,
        timeout_s: float,
        *,
        fail: Callable[[Sequence, Exception], None],
        raise_if_lost: Callable[[Exception], None],
    ) -> None:
        self.under_way: list[Handoff] = []
        self._prefilled: list[Sequence] = []
        """Requests whose prefill has ended and whose last blocks may still be on their way."""
        self.transfer = transfer
        self._scheduler = scheduler
        self._observer = observer
        self._steps = steps
        self._timeout_s = timeout_s
        self._fail = fail
        self._raise_if_lost = raise_if_lost

    def __len__(self) -> int:
        return len(self.under_way)

    @property
    def is_stuck(self) -> bool:
        """Whether a copy has not ended in its time, so that nobody should wait for those behind it."""
        return any(handoff.timed_out for handoff in self.under_way)

    def awaited(self) -> list[Handoff]:
        return [handoff for handoff in self.under_way if not handoff.timed_out]

    def send(self, step: PrefillStep, after: Event) -> None:
        """Hands over the blocks that a prefill step completes; copies wait for the step on the device."""
        for chunk in step.rows:
            if not chunk.handoff:
                continue
            self._scheduler.hold(chunk.lease)
            try:
                handle = self.transfer.send(chunk.handoff, after)
            except Exception as error:  # noqa: BLE001 - a copy that cannot be launched fails its request alone
                self._raise_if_lost(error)
                self._scheduler.release(chunk.lease)
                self._fail(chunk.seq, HandoffError(f"{self._observer.about_handoff(chunk.seq)}: {error}"))
                continue
            self.under_way.append(Handoff(chunk.seq, chunk.lease, chunk.handoff, handle, step))
            self._observer.handoff_sent(chunk.seq, chunk.handoff)

    def step_ended(self, step: PrefillStep) -> None:
        """Notes the requests whose prefill this step has ended, and when its blocks' time runs out."""
        self._prefilled += self._scheduler.get_prefilled_sequences()
        for handoff in self.under_way:
            if handoff.step is step:
                handoff.computed_s = time.perf_counter()
                handoff.deadline_s = handoff.computed_s + self._timeout_s

    def collect(self) -> bool:
        """Takes in what has arrived or failed, and fails what is late; whether anything has ended."""
        has_ended = False
        for handoff in list(self.under_way):
            if handoff.handle.is_done():
                self.under_way.remove(handoff)
                self._handoff_ended(handoff)
                has_ended = True
            elif time.perf_counter() > handoff.deadline_s and not handoff.timed_out:
                handoff.timed_out = handoff.lease.stuck = True
                if handoff.seq.lease is handoff.lease:
                    self._fail(handoff.seq, HandoffTimeout(self._timeout_message(handoff)))
        prefilled, self._prefilled = self._prefilled, []
        for seq in prefilled:
            if seq.status is SequenceStatus.HANDING_OFF and seq.lease is not None:
                if seq.lease.in_flight:
                    self._prefilled.append(seq)
                else:
                    self._scheduler.handoff_done(seq)
        return has_ended

    def fail_waiting(self, seq: Sequence) -> None:
        """Ends a request that waits for blocks which a copy without end holds."""
        assert self.under_way, f"request {seq.request_id} waits for nothing that will ever happen"
        message = f"request {seq.request_id} waits for blocks that a handoff without end holds"
        self._scheduler.give_up(seq, HandoffTimeout(f"{message}: {self._timeout_message(self.under_way[0])}"))

    def forget(self) -> list[Lease]:
        """Forgets all handoffs, after an interrupt, but for those whose copies do not end; the leases of these.

        One entry for each copy that may still write to its blocks.
        """
        # Copies behind one that does not end may still write to their blocks.
        self.under_way = self.under_way if self.is_stuck else []
        for handoff in self.under_way:
            handoff.timed_out = handoff.lease.stuck = True
        self._prefilled.clear()
        return [handoff.lease for handoff in self.under_way]

    def drop(self) -> list[Handoff]:
        """Forgets all handoffs, of which no device will tell any more."""
        dropped, self.under_way, self._prefilled = self.under_way, [], []
        return dropped

    def _handoff_ended(self, handoff: Handoff) -> None:
        error = None
        try:
            handoff.handle.wait()
        except Exception as raised:  # noqa: BLE001 - whatever went wrong on the way fails this request alone
            self._raise_if_lost(raised)
            error = HandoffError(f"{self._observer.about_handoff(handoff.seq)}: {raised}")
        self._observer.handoff_ended(handoff, arrived=error is None)
        if error is None:
            self._scheduler.blocks_arrived(handoff.lease)
        else:
            self._scheduler.release(handoff.lease)
            if handoff.seq.lease is handoff.lease:
                self._fail(handoff.seq, error)

    def _timeout_message(self, handoff: Handoff) -> str:
        pools = (self._scheduler.prefill_pool, self._scheduler.decode_pool)
        prefill_state, decode_state = (f"{pool.num_held_blocks} of {pool.num_blocks} blocks held" for pool in pools)
        return (
            f"{self._observer.about_handoff(handoff.seq)}: {len(handoff.pairs)} blocks, from {handoff.pairs[0][0]} to "
            f"{handoff.pairs[0][1]} on, have not arrived within handoff_timeout_s={self._timeout_s}; "
            f"prefill pool: {prefill_state}; decode pool: {decode_state}; handoffs under way: {len(self)}; "
            f"steps in flight: {len(self._steps)}. The blocks stay held until the copy ends"
        )
