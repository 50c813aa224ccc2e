"""Appends sampled tokens to requests, turns them into text, finds stops, and emits outputs to the calls that wait.

Nothing else writes a request's output tokens, text and emission state. Knows nothing of devices.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque

import numpy as np

from nanovllm.engine.callers import Inbox
from nanovllm.engine.execution.step_handle import SampledOnHost
from nanovllm.engine.mailbox import NewRequest
from nanovllm.engine.observer import Observer
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.decode_batch import HostDecodeBatch
from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.streamed_rows import StreamedRows
from nanovllm.engine.text.request_text import NoText, RequestText
from nanovllm.errors import NonFiniteLogitsError
from nanovllm.outputs import FinishReason, RequestOutput, TokenLogprobs

logger = logging.getLogger(__name__)


class OutputProcessor:
    """The requests that the engine has taken in, until their last output is emitted.

    Args:
        scheduler: is told of new tokens and of requests that end.
        observer: is told of requests whose last output is emitted.

    Attributes:
        sequences: the requests by id, oldest first.
    """

    def __init__(self, scheduler: Scheduler, observer: Observer) -> None:
        self.sequences: dict[int, Sequence] = {}
        self._scheduler = scheduler
        self._observer = observer
        self._texts: dict[int, RequestText] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._streamed: dict[Card, StreamedRows] = {}
        """The streamed requests of each card's batch, as of its last step that ended."""

    def add(self, new: NewRequest) -> None:
        """Takes in a request; adding it again changes nothing."""
        request_id = new.seq.request_id
        self._texts[request_id], self._inboxes[request_id] = new.text, new.inbox
        new.inbox.request_ids.add(request_id)
        self.sequences[request_id] = new.seq

    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.sequences.values() if not seq.is_finished]

    def clear(self) -> None:
        """Forgets all requests: the engine is closed."""
        for kept in (self.sequences, self._texts, self._inboxes, self._streamed):
            kept.clear()

    # Tokens

    def take_tokens_after_chunks(self, live: list[bool], step: Step, sampled: SampledOnHost) -> None:
        """Appends the first sampled token to each request whose last chunk was in a step.

        Args:
            live: for each of the step's chunks, whether its request still has the lease that the chunk ran under.
            step: the step.
            sampled: a token for each chunk that is the last of its prompt.
        """
        last = [(chunk.seq, is_live) for chunk, is_live in zip(step.chunks, live, strict=True) if chunk.is_last]
        assert len(last) == len(sampled.token_ids), "a token for each request whose prompt is complete"
        for index, (seq, is_live) in enumerate(last):
            if is_live:
                self._observer.times.got_token(seq)
                self.append(seq, int(sampled.token_ids[index]), sampled.logprobs_of(index))

    def take_prompt_logprobs(self, live: list[bool], step: Step, reported: SampledOnHost) -> None:
        """Keeps the log-probabilities of the prompt tokens that a step's chunks reported.

        Args:
            live: as of `take_tokens_after_chunks`; what others reported is computed again.
            step: the step.
            reported: what was asked of its chunks, one after the other.
        """
        if reported.logprobs is None:
            return
        end = 0
        for chunk, is_live in zip(step.chunks, live, strict=True):
            seq, positions = chunk.seq, chunk.logprob_positions
            start, end = end, end + len(positions)
            if is_live and positions:
                assert positions.start == len(seq.prompt_logprobs), "a prompt is reported in order, and once"
                count = seq.params.prompt_logprobs or 0
                seq.prompt_logprobs.extend([entry.first(count) for entry in reported.logprobs[start:end]])

    def take_decoded_tokens(self, step: Step, sampled: SampledOnHost) -> None:
        """Appends the next token to the requests of a step's decode part, except to those that have ended meanwhile."""
        rows, batch, token_ids = step.decode, step.decode.batch, sampled.token_ids.tolist()
        are_last = rows.are_last(sampled.token_ids)
        complete_blocks = rows.complete_blocks(step.card.block_manager.block_size)
        needs_more = are_last | complete_blocks | batch.checks_every_token
        live = np.ones(len(batch), dtype=bool)
        if rows.ended_leases:
            live[:] = [seq.lease is lease for seq, lease in zip(batch.seqs, batch.leases, strict=True)]
        self._observer.times.got_tokens(batch.token_time_indices[live])
        if not batch.are_all_checked:
            # Most tokens are only appended. `deque` runs the appends in C: a Python loop over 256 rows takes five times
            # as long, in every step.
            only_append = (live & ~needs_more).tolist()
            token_lists = itertools.compress(batch.token_lists, only_append)
            deque(map(list.append, token_lists, itertools.compress(token_ids, only_append)), maxlen=0)
        one_by_one = live & needs_more
        if batch.are_some_checked:
            streamed = self._streamed_rows(step.card, batch)
            at_once = live & streamed.are_simple & ~are_last
            left = streamed.emit(at_once.nonzero()[0].tolist(), token_ids)
            one_by_one &= ~at_once
            one_by_one[left] = True
            at_once[left] = False
            for index in (at_once & complete_blocks).nonzero()[0].tolist():
                self._scheduler.token_appended(batch.seqs[index])
        for index in one_by_one.nonzero()[0].tolist():
            self.append(batch.seqs[index], token_ids[index], sampled.logprobs_of(index))

    def _streamed_rows(self, card: Card, batch: HostDecodeBatch) -> StreamedRows:
        """The same as in the card's last step, as long as its batch is."""
        streamed = self._streamed.get(card)
        if streamed is None or streamed.batch is not batch:
            streamed = self._streamed[card] = StreamedRows(batch, self._texts, self._inboxes)
        return streamed

    def append(self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Appends a token to a request, and ends the request if that was its last token.

        Args:
            seq: the request.
            token_id: negative where the logits were not finite: then the request ends with an error.
            logprobs: of this token, None if nobody in its step asked for any.
        """
        if token_id < 0:
            self._end_without_token(seq)
            return
        seq.token_ids.append(token_id)
        if logprobs is not None and seq.params.logprobs is not None:
            seq.logprobs.append(logprobs.first(seq.params.logprobs))
        self._scheduler.token_appended(seq)
        if seq.first_token_s is None:
            seq.first_token_s = time.perf_counter()
        is_stop_token = token_id in seq.stop_token_ids
        text = self._texts[seq.request_id]
        may_stop = seq.num_output_tokens >= seq.params.min_tokens
        try:
            delta = text.add_stop_token(token_id) if is_stop_token else text.add([token_id], may_stop=may_stop)
        except Exception as error:  # noqa: BLE001 - whatever a tokenizer raises ends one request, not the engine
            self._text_failed(seq, error)
            return
        if is_stop_token or text.stopped:
            self.finish(seq, "stop", delta)
        elif len(seq.token_ids) >= seq.max_num_tokens:
            self.finish(seq, "length", delta)
        elif seq.is_streamed:
            self.emit(seq, delta)

    def finish(self, seq: Sequence, reason: FinishReason, text_delta: str = "", error: Exception | None = None) -> None:
        """Ends a request in whatever state it is and emits its last output."""
        self._scheduler.finish(seq, reason, error)
        self.emit(seq, text_delta)

    def fail(self, seq: Sequence, error: Exception, *, blames_card: bool = True) -> None:
        """Handles an error of one request: the first is answered by a retry, the second ends it.

        Its card's breaker counts it if `blames_card`.
        """
        has_ended = self._scheduler.fail(seq, error, blames_card=blames_card)
        logger.warning("request %d failed (%s); %s", seq.request_id, error, "giving up" if has_ended else "retrying")
        self._observer.log_prefill_health()
        if has_ended:
            self.emit(seq)

    def _end_without_token(self, seq: Sequence) -> None:
        """Ends a request whose logits are not finite, without a retry, and removes its KV from the prefix cache."""
        error = NonFiniteLogitsError(
            f"request {seq.request_id}: the logits of output token {seq.num_output_tokens} are NaN or infinite; "
            "check the checkpoint, or try another dtype (float16 overflows where bfloat16 and float32 do not)"
        )
        logger.warning("%s", error)
        self._scheduler.forget_cached_blocks(seq)
        self.finish(seq, "error", error=error)

    def _text_failed(self, seq: Sequence, error: Exception) -> None:
        logger.warning("the text of request %d failed (%s); giving up", seq.request_id, error)
        self._texts[seq.request_id] = NoText()
        self.finish(seq, "error", error=error)

    # Outputs

    def emit(self, seq: Sequence, text_delta: str = "") -> None:
        """Emits the tokens that were not emitted yet; a request's last output has the rest of its text."""
        if seq.is_finished:
            is_first_time, seq.finished_s = seq.finished_s is None, time.perf_counter()
            try:
                text_delta += self._texts[seq.request_id].finish(seq.text_token_ids)
            except Exception as error:  # noqa: BLE001 - as above
                logger.warning("the text of request %d failed (%s); giving up", seq.request_id, error)
                seq.finish_reason, seq.error = "error", error
                seq.timeline.mark(f"ended: error, {error}")
            if is_first_time:
                self._observer.request_ended(seq)
        new_token_ids = seq.token_ids[seq.num_emitted_tokens :]
        new_logprobs = None
        if new_token_ids and seq.params.logprobs is not None:
            new_logprobs = seq.logprobs[seq.num_emitted_tokens - seq.num_prompt_tokens :]
        output = RequestOutput(
            request_id=seq.request_id,
            new_token_ids=new_token_ids,
            text=text_delta,
            finished=seq.is_finished,
            finish_reason=seq.finish_reason,
            error=seq.error,
            new_logprobs=new_logprobs,
            ttft_s=None if seq.first_token_s is None else seq.first_token_s - seq.arrival_s,
            latency_s=None if seq.finished_s is None else seq.finished_s - seq.arrival_s,
            prompt_logprobs=_prompt_logprobs_due(seq),
        )
        # In this order, so that `repair` can tell what an interrupt left undone.
        seq.output = output
        self._inboxes[seq.request_id].put(output)
        self._mark_emitted(seq)

    def _mark_emitted(self, seq: Sequence) -> None:
        seq.num_emitted_tokens = len(seq.token_ids)
        if seq.is_finished:
            self._texts.pop(seq.request_id, None)
            inbox = self._inboxes.get(seq.request_id)
            if inbox is not None:
                inbox.request_ids.discard(seq.request_id)
            self._inboxes.pop(seq.request_id, None)
            self.sequences.pop(seq.request_id, None)  # last, so that `repair` finds what is left
        seq.output = None

    # Requests that nobody waits for any more

    def abort_unknown(self, seq: Sequence) -> None:
        """Aborts a request whose id no caller has; its output reaches nobody."""
        self._inboxes[seq.request_id].request_ids.discard(seq.request_id)
        self._inboxes[seq.request_id] = Inbox()
        self.finish(seq, "abort")

    def abort_all_of(self, inbox: Inbox) -> None:
        """Aborts the unfinished requests of an inbox."""
        for request_id in sorted(inbox.request_ids):
            seq = self.sequences.get(request_id)
            if seq is not None and not seq.is_finished:
                self.finish(seq, "abort")

    def abort_abandoned(self) -> None:
        """Aborts the requests of calls that are over."""
        for inbox in set(self._inboxes.values()):
            if inbox.is_abandoned:
                self.abort_all_of(inbox)

    # After an interrupt

    def repair(self) -> None:
        """Repairs what an interrupt broke off; all unfinished requests have the state WAITING.

        A streamed request that was just being given a token is aborted, since a piece of its text may be lost.
        """
        for seq in self._without_emitted():
            is_half_emitted = seq.is_streamed and seq.num_emitted_tokens != seq.num_tokens
            if not seq.is_finished and (is_half_emitted or (seq.num_output_tokens and not seq.is_streamed)):
                # Its last token may be half taken in: it is dropped, and sampled again with the same result.
                seq.token_ids.pop()
                del seq.logprobs[seq.num_output_tokens :]
            if seq.is_finished or is_half_emitted:
                self._end_interrupted(seq)

    def fail_all(self, error: Exception) -> None:
        """Ends all unfinished requests, which have the state WAITING, with this error."""
        for seq in self.unfinished():
            self._scheduler.finish(seq, "error", error)
        for seq in self._without_emitted():
            self.emit(seq)

    def _end_interrupted(self, seq: Sequence) -> None:
        if seq.is_streamed:
            self._texts[seq.request_id] = NoText()
        if not seq.is_finished:
            self._scheduler.finish(seq, "abort")
        elif seq.is_streamed and seq.error is None:
            seq.finish_reason = "abort"
        self.emit(seq)

    def _without_emitted(self) -> list[Sequence]:
        """All requests, except one whose output had reached its inbox without being marked as emitted; marks it.

        This is asked of all requests before anything is emitted: an inbox remembers only its last output.
        """
        return [seq for seq in list(self.sequences.values()) if not self._was_emitted(seq)]

    def _was_emitted(self, seq: Sequence) -> bool:
        output, inbox = seq.output, self._inboxes.get(seq.request_id)
        if inbox is not None and (output is None or not inbox.was_put_last(output)):
            return False
        self._mark_emitted(seq)
        return True


def _prompt_logprobs_due(seq: Sequence) -> list[TokenLogprobs | None] | None:
    """What the output with a request's first token says of its prompt; None of all others."""
    if seq.params.prompt_logprobs is None or seq.num_emitted_tokens != seq.num_prompt_tokens:
        return None
    if not seq.num_output_tokens:
        return None
    assert len(seq.prompt_logprobs) == seq.num_prompt_tokens - 1, "a token is sampled once the whole prompt has run"
    return [None, *seq.prompt_logprobs]
