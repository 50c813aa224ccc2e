"""The loop: takes requests in, launches what the scheduler decides, collects what has ended. One turn at a time."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Collection

from nanovllm.engine.card_watch import CardWatch
from nanovllm.engine.execution.step_handle import StepFailedError
from nanovllm.engine.handoffs import Handoffs
from nanovllm.engine.in_flight import FormedStep, InFlight, StepsInFlight
from nanovllm.engine.launch_times import LaunchTimes
from nanovllm.engine.mailbox import Abort, Mailbox, NewRequest
from nanovllm.engine.observer import Observer
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.runners import Runners
from nanovllm.engine.scheduler import STEPS_AHEAD, Scheduler
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.step import PrefillChunk, Step
from nanovllm.engine.step_listeners import StepListeners
from nanovllm.errors import DeviceError

MAX_ARRIVALS_PER_TURN = 256
"""New requests that a turn takes in: those that come faster wait in the mailbox, and decode steps go on."""

LESSONS_PER_S = 100
"""Decode steps of all remote cards in a second that step times are learned from: tens of cards run hundreds."""

LONGEST_PAUSE_S = 5e-3
"""Seconds between two decode steps of a card up to which the first one's requests have waited for the second."""

TURNS_PER_SWEEP = 64
"""Turns from one search for requests whose callers are gone without having closed their inbox to the next."""


class Loop:
    """Moves all requests on, one turn at a time. The caller must have the turn: see `Turns`.

    Args:
        runners: run the steps.
        scheduler: forms the steps.
        steps, handoffs: the work in flight.
        launch_times: say when steps are launched.
        outputs: is given the tokens.
        mailbox: what calls have posted.
        observer: is told of steps.
        listeners: are told of steps that have ended.
        card_watch: looks after cards in processes of their own.
        handoff_timeout_s: seconds without progress after which a request that waits for blocks of a stuck copy ends.
        step_timeout_s: seconds after which a step that has not ended means that its device is lost.
    """

    def __init__(
        self,
        runners: Runners,
        scheduler: Scheduler,
        steps: StepsInFlight,
        handoffs: Handoffs,
        launch_times: LaunchTimes,
        outputs: OutputProcessor,
        mailbox: Mailbox,
        observer: Observer,
        listeners: StepListeners,
        card_watch: CardWatch,
        *,
        handoff_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        self._runners = runners
        self._scheduler = scheduler
        self._steps = steps
        self._handoffs = handoffs
        self._launch_times = launch_times
        self._launch_at_s = math.inf
        """When the next step that was put off is to be launched."""
        self._passed_over: set[Card] = set()
        """Cards that were given no step in the last turn, since tokens of another one's were to be taken in."""
        self._outputs = outputs
        self._mailbox = mailbox
        self._observer = observer
        self._listeners = listeners
        self._card_watch = card_watch
        self._handoff_timeout_s = handoff_timeout_s
        self._step_timeout_s = step_timeout_s
        self._is_stopped = False
        self._turns_until_sweep = TURNS_PER_SWEEP
        self._step_times: list[tuple[Step, float, float, float | None]] = []
        """Steps that have ended, what they took, how much of that may have been their launch, and the gap before their
        tokens, if one is known: what the scheduler has not been told."""
        self._taken_in: dict[Card, tuple[float, float]] = {}
        """When the tokens of a card's last decode step were taken in, and when that had ended."""
        self._last_progress_s = time.perf_counter()
        self._taught_s: dict[Card, float] = {}
        """When the last step of each remote card ended from which step times were learned."""

    def run_turn(self) -> None:
        """One turn: launch what can be launched, else wait until something can be or has ended; collect what has."""
        self.take_in_mail()
        self._card_watch.look()
        if self._card_watch.has_cards:
            self.collect_steps()  # nothing more ends until the next look, so that launches need not give way
        launched = self.launch_steps()
        self._tell_step_times()
        if not launched and self._steps.formed is None:
            self._listeners.time_wait(self._wait)
            if time.perf_counter() >= self._launch_at_s:
                launched = self.launch_steps()
        if launched:
            self._progressed()
        self.collect_steps()
        if self._handoffs.collect():
            self._progressed()
        self._check_steps_end()
        self._observer.log_prefill_health()

    def stop(self) -> None:
        """Ends a wait that is under way."""
        self._is_stopped = True

    # Mail

    def sweep_next_turn(self) -> None:
        """The next turn looks for requests whose callers are gone."""
        self._turns_until_sweep = 0

    def take_in_mail(self) -> None:
        """Takes in new requests, aborts, and requests that nobody waits for any more."""
        mail = self._mailbox
        for _ in range(min(len(mail.arrived), MAX_ARRIVALS_PER_TURN)):
            self._take_in(mail.arrived[0])
            mail.arrived.popleft()
        for _ in range(len(mail.aborts)):
            self._take_in_abort(mail.aborts[0])
            mail.aborts.popleft()
        for _ in range(len(mail.closed_inboxes)):
            self._outputs.abort_all_of(mail.closed_inboxes[0])
            mail.closed_inboxes.popleft()
        self._turns_until_sweep -= 1
        if self._turns_until_sweep <= 0:
            self._turns_until_sweep = TURNS_PER_SWEEP
            self._outputs.abort_abandoned()

    def _take_in(self, new: NewRequest) -> None:
        self._outputs.add(new)
        self._scheduler.add(new.seq)
        early_abort = self._mailbox.early_aborts.get(new.seq.request_id)
        if early_abort is not None:
            self._take_in_abort(early_abort)
            self._mailbox.early_aborts.pop(new.seq.request_id)
        elif new.inbox.is_abandoned:
            self._outputs.finish(new.seq, "abort")

    def _take_in_abort(self, abort: Abort) -> None:
        seq = abort.seq
        if seq.request_id not in self._outputs.sequences and not seq.is_finished:
            self._mailbox.early_aborts[seq.request_id] = abort  # it has not been taken in
            return
        if not seq.is_finished:
            if abort.is_known:
                self._outputs.finish(seq, "abort")
            else:
                self._outputs.abort_unknown(seq)
        self._mailbox.aborting.discard(seq)

    # Steps

    def launch_steps(self) -> bool:
        """Launches every step that a card can be given now. Returns whether there was one.

        Where another card's step has ended meanwhile, the turn ends early, before or within a launch: its tokens come
        first, but not time and again, since the other card's steps may be short.
        """
        # Not needed for remote cards: their steps end only between turns.
        self._launch_at_s, before = math.inf, set() if self._card_watch.has_cards else set(map(id, self._steps))
        launched = self._launch_formed(before)
        for card in self._by_urgency():
            if self._steps.formed is not None:
                break
            if self._card_watch.has_cards and self._steps.num_on(card) >= STEPS_AHEAD:
                continue  # of many cards most are as far ahead as they may be
            if not self._is_due(card, before):
                continue
            works, began_s = self._steps.on(card), time.perf_counter()
            step = self._scheduler.schedule(card, [work.step for work in works], self._launch_times.free_in_s)
            if step is None:
                self._launch_times.excuse(card)
            else:
                self._steps.formed = FormedStep(step, works, time.perf_counter() - began_s)
                launched = self._launch_formed(before) or launched
        for seq in self._scheduler.get_outgrown_sequences():
            self._outputs.emit(seq)
        return launched

    def _by_urgency(self) -> list[Card]:
        """The cards, those first whose next step has to be launched first; last those that are idle, or have as many
        steps as they may.

        In a fixed order the same card's launches would always give way to the others', and its requests would have
        longer gaps. Steps of remote cards are launched at once.
        """
        cards = self._scheduler.cards
        if len(cards) == 1 or self._card_watch.has_cards or not self._scheduler.has_streamed_requests:
            return cards
        due_on, num_on = self._launch_times.due_on, self._steps.num_on
        return sorted(cards, key=lambda card: due_on(card) if num_on(card) == 1 else math.inf)

    def _is_due(self, card: Card, before: Collection[int]) -> bool:
        """Whether the card is given its next step now. `before` is what was in flight when the turn began."""
        # Else hardly anyone can become ready meanwhile, and nobody waits for the next token.
        if self._scheduler.has_streamed_requests:
            # Looked at for each card: a launch takes some time.
            if self._has_tokens_of_others(card, before) and card not in self._passed_over:
                self._passed_over.add(card)
                self._launch_times.excuse(card)
                return False
            self._passed_over.discard(card)
            launch_at_s = self._launch_times.next_on(card)
            if launch_at_s > time.perf_counter():
                self._launch_at_s = min(self._launch_at_s, launch_at_s)
                return False
        # Else the step that was put off is launched first, in its time.
        return not self._launch_times.makes_late(card, self._launch_at_s)

    def _has_tokens_of_others(self, card: Card, before: Collection[int]) -> bool:
        """Whether a step of another card that was in flight when the turn began has ended; of remote cards none has."""
        if self._card_watch.has_cards:
            return False
        return any(work.step.card is not card and id(work) in before for work in self._steps.ended())

    def _launch_formed(self, before: Collection[int]) -> bool:
        """Prepares and launches the step that is formed, unless that is put off. Returns whether it was launched."""
        formed = self._steps.formed
        if formed is None or self._put_off_for_tokens(formed, before):
            return False
        error = None if formed.is_prepared else self._prepare(formed)
        if error is None and self._put_off_for_tokens(formed, before):
            return False
        step, began_s = formed.step, time.perf_counter()
        self._steps.formed = None
        launched = self._launch(step) if error is None else self._launch_failed(step, error)
        self._launch_times.launched(step.card, formed.before, formed.took_s + time.perf_counter() - began_s)
        return launched

    def _prepare(self, formed: FormedStep) -> Exception | None:
        """Has the runner do what it can ahead of the launch. Returns what went wrong, if anything did."""
        began_s = time.perf_counter()
        try:
            self._runners[formed.step.card].prepare(formed.step)
        except Exception as error:  # noqa: BLE001 - as in `_launch`
            return error
        formed.is_prepared = True
        formed.took_s += time.perf_counter() - began_s
        return None

    def _put_off_for_tokens(self, formed: FormedStep, before: Collection[int]) -> bool:
        """Puts a launch off to the next turn, but not twice, if another card's tokens are there. Returns whether."""
        if formed.has_given_way or not self._scheduler.has_streamed_requests:
            return False
        formed.has_given_way = self._has_tokens_of_others(formed.step.card, before)
        if formed.has_given_way:
            self._launch_times.excuse(formed.step.card)
        return formed.has_given_way

    def _launch(self, step: Step) -> bool:
        """Launches a step. Returns whether it, or a part of it, was launched."""
        runner, error, began_s = self._runners[step.card], None, time.perf_counter()
        try:
            handle = runner.launch(step)
        except Exception as raised:  # noqa: BLE001 - whatever a forward pass raises ends one request, not the engine
            error = raised
        if error is not None:
            return self._launch_failed(step, error)
        self._steps.add(step, handle, began_s)
        if step.chunks:
            self._observer.step_launched(step)
            self._handoffs.send(step, handle.event)
        return True

    def _launch_failed(self, step: Step, error: Exception) -> bool:
        """Launches the halves of a step that could not be, until the failing request is alone in one, and fails."""
        # The frames hold the failed step's tensors, which would stay alive with the error.
        traceback.clear_frames(error.__traceback__)
        self._runners.raise_if_lost(error)
        self._undo_launch(step)
        if self._card_watch.is_lost(step.card):
            self._scheduler.steps_lost([step])
            return False
        halves = self._scheduler.halve(step)
        if halves is not None:
            launched = [self._launch(half) for half in halves]
            return any(launched)
        (seq,), (lease,) = step.seqs, step.leases
        self._scheduler.cancel(step)
        if seq.lease is lease:
            self._outputs.fail(seq, error)
            self._progressed()
        return False

    def _undo_launch(self, step: Step) -> None:
        """Waits for the work that a step had launched before it failed: it may write to KV blocks and decode rows.

        The rows are sent again, once the host has the tokens of earlier steps. These are taken in after the steps of
        another card whose chunks they have read. What a lost card has not ended stays for whoever takes note.
        """
        runner = self._runners[step.card]
        runner.synchronize(copies=not self._handoffs.is_stuck)
        if self._scheduler.placement.decodes(step.card):
            cards = {step.card, *(work.step.card for work in self._steps if work.step.shared_chunks)}
            for card in cards - {step.card}:
                self._runners[card].synchronize(copies=not self._handoffs.is_stuck)
            for work in [work for work in self._steps if work.step.card in cards]:
                if self._card_watch.is_lost(work.step.card) and not work.handle.is_done():
                    cards.discard(work.step.card)
                if work in self._steps and work.step.card in cards:
                    self._collect(work)
            runner.forget_device_batch()

    def collect_steps(self) -> None:
        """Takes in the tokens of the steps that have ended."""
        for work in self._steps.ended():
            if work in self._steps:  # else it was given up with one before it
                self._collect(work)

    def _collect(self, work: InFlight) -> None:
        step, counters = work.step, self._observer.counters
        try:
            tokens = work.handle.collect()
        except StepFailedError as error:
            self._card_watch.step_failed(work, error.failure)
            self._progressed()
            return
        self._runners[
            step.card
        ].check_workers()  # collectives with a rank that is gone were ended, and their results mean nothing
        began_s, ended_s = work.handle.moments()
        self._steps.remove(work, ended_s)
        self._observer.step_ended(work, tokens.waits)
        self._listeners.step_ended(work)
        self._progressed()
        if step.chunks:
            counters.prefill_steps += 1
            counters.prefill_tokens += step.num_prefill_tokens
            live = [self._chunk_ended(chunk, tokens.waits.missed_layer) for chunk in step.chunks]
            self._outputs.take_prompt_logprobs(live, step, tokens.in_prompts)
            self._outputs.take_tokens_after_chunks(live, step, tokens.after_chunks)
            self._handoffs.step_ended(step)
        if step.decode:
            counters.decode_steps += 1
            counters.decode_tokens += step.decode.num_live
            self._scheduler.decode_done(step)
            self._scheduler.step_worked(step)
            self._outputs.take_decoded_tokens(step, tokens.after_decode)
        gap_s = self._gap_s(step, began_s, ended_s)
        if step.chunks or self._teaches(step.card, ended_s):
            # The time of a step that began within its launch may include a part of that. Waiting for another card,
            # perhaps meanwhile, is not the step's.
            waited_s = tokens.waits.waited_s
            launch_s = 0.0 if work.handle.ran_in_launch else max(work.launched_s - began_s - waited_s, 0.0)
            self._step_times.append((step, ended_s - began_s - waited_s, launch_s, gap_s))

    def _teaches(self, card: Card, ended_s: float) -> bool:
        """Whether step times are learned from a decode step that ended then."""
        if self._card_watch.has_cards:
            if ended_s - self._taught_s.get(card, -math.inf) < len(self._scheduler.cards) / LESSONS_PER_S:
                return False
            self._taught_s[card] = ended_s
        return True

    def _gap_s(self, step: Step, began_s: float, ended_s: float) -> float | None:
        """Seconds since the tokens of its card's last step were taken in, as a caller sees them.

        None if one of the two has no decode rows, the last one had not just ended, or nobody sees single tokens.
        """
        if not step.decode or not self._scheduler.has_streamed_requests:
            self._taken_in.pop(step.card, None)
            return None
        now_s = time.perf_counter()
        before_s, before_ended_s = self._taken_in.get(step.card, (0.0, -math.inf))
        self._taken_in[step.card] = now_s, ended_s
        return now_s - before_s if began_s - before_ended_s < LONGEST_PAUSE_S else None

    def _tell_step_times(self) -> None:
        """Has the scheduler learn from the steps of the last turn. It takes a while, for which neither their tokens nor
        the next launch should wait."""
        for step, took_s, launch_s, gap_s in self._step_times:
            self._scheduler.step_took(step, took_s, gap_s, launch_s=launch_s)
        self._step_times.clear()

    def _chunk_ended(self, chunk: PrefillChunk, missed_layer: int | None) -> bool:
        """Takes in a chunk that has run. Returns whether it is live: what it computed is of use."""
        if missed_layer is None or not chunk.waits_for:
            return self._scheduler.prefill_done(chunk)
        self._scheduler.chunk_missed(chunk)
        if chunk.seq.lease is chunk.lease:
            self._outputs.fail(chunk.seq, self._handoffs.missed(chunk, missed_layer))
        return False

    # Nothing to launch

    def _wait(self) -> None:
        """Waits until a step or a handoff has ended, a step is to be launched, or a handoff is late."""
        handoffs = self._handoffs.awaited()
        if not self._steps and not handoffs:
            self._give_up_on_stuck_blocks()
            return
        while not (
            self._is_stopped
            or self._mailbox.arrived
            or self._card_watch.has_news
            or self._steps.is_any_done()
            or time.perf_counter() >= self._launch_at_s
            or any(handoff.handle.is_done() or time.perf_counter() > handoff.deadline_s for handoff in handoffs)
        ):
            self._check_steps_end()
            self._card_watch.rest()

    def _give_up_on_stuck_blocks(self) -> None:
        """Ends the oldest request if nothing has run for `handoff_timeout_s`: it waits for blocks of a stuck copy."""
        time.sleep(1e-3)
        if self._card_watch.is_starting:
            self._progressed()  # what waits for nothing else waits for the card
        waiting = self._scheduler.unfinished()
        if waiting and time.perf_counter() - self._last_progress_s >= self._handoff_timeout_s:
            self._handoffs.fail_waiting(waiting[0])
            self._progressed()

    def _check_steps_end(self) -> None:
        """Raises DeviceError if a step is late, WorkerError if a rank is gone."""
        self._runners.check_workers()
        late = self._steps.late(self._step_timeout_s)
        if late is not None and not self._card_watch.gave_up(late, self._step_timeout_s):
            step = late.step
            error = DeviceError(
                f"{step.card} is lost: a {step.kind} step of {step.num_requests} requests has not ended "
                f"within step_timeout_s={self._step_timeout_s}"
            )
            raise self._runners[step.card].diagnose(error)

    def _progressed(self) -> None:
        self._last_progress_s = time.perf_counter()
