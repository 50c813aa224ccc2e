"""Turns a scheduled step into the tensors of a forward pass. Knows nothing about models or who asked for the step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.scheduler import DecodeStep, PrefillStep
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.sampler import SamplingInputs
from nanovllm.utils.device import Device


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass over T tokens, of which N are followed by a sampled token.

    Attributes:
        input_ids, positions: [T] int64.
        metadata: where the tokens' KV is.
        sampled_rows: [N] int64 rows of T whose logits are wanted; None for all of them.
        sampling: parameters of the N rows, None if N is 0.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampled_rows: torch.Tensor | None
    sampling: SamplingInputs | None


@dataclass(frozen=True)
class _Span:
    """Tokens [start, end) of a request, whose blocks are `table`."""

    seq: Sequence
    start: int
    end: int
    table: list[int]


def prefill_inputs(step: PrefillStep, block_size: int, vocab_size: int, device: Device) -> ModelInputs:
    """The tensors of a prefill step, whose KV goes to the blocks of each lease's prefill table."""
    spans = [_Span(chunk.seq, chunk.start, chunk.end, chunk.lease.prefill_table) for chunk in step.rows]
    last_rows = np.cumsum([chunk.end - chunk.start for chunk in step.rows]) - 1
    sampled = [row for row, chunk in zip(last_rows, step.rows, strict=True) if chunk.is_last]
    seqs = [chunk.seq for chunk in step.rows if chunk.is_last]
    return _inputs(spans, np.array(sampled, dtype=np.int64), seqs, block_size, vocab_size, device)


def decode_inputs(step: DecodeStep, block_size: int, vocab_size: int, device: Device) -> ModelInputs:
    """The tensors of a decode step: the last token of every request."""
    seqs = [row.seq for row in step.rows]
    spans = [_Span(row.seq, row.seq.num_tokens - 1, row.seq.num_tokens, row.lease.decode_table) for row in step.rows]
    return _inputs(spans, None, seqs, block_size, vocab_size, device)


def _inputs(
    spans: list[_Span],
    sampled_rows: np.ndarray | None,
    sampled_seqs: list[Sequence],
    block_size: int,
    vocab_size: int,
    device: Device,
) -> ModelInputs:
    lengths = np.array([span.end - span.start for span in spans])
    positions = np.concatenate([np.arange(span.start, span.end, dtype=np.int64) for span in spans])
    tokens = np.concatenate([np.array(span.seq.token_ids[span.start : span.end], dtype=np.int64) for span in spans])
    tables = np.zeros((len(spans), max(-(-span.end // block_size) for span in spans)), dtype=np.int32)
    for row, span in enumerate(spans):
        num_blocks = -(-span.end // block_size)
        tables[row, :num_blocks] = span.table[:num_blocks]
    rows = np.repeat(np.arange(len(spans)), lengths)
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    ends = np.array([span.end for span in spans], dtype=np.int32)
    metadata = AttentionMetadata(
        slot_mapping=device.tensor(slots),
        block_tables=device.tensor(tables),
        context_lens=device.tensor(ends),
        query_starts=device.tensor(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)),
        max_query_len=int(lengths.max()),
        max_context_len=int(ends.max()),
    )
    return ModelInputs(
        input_ids=device.tensor(tokens),
        positions=device.tensor(positions),
        metadata=metadata,
        sampled_rows=None if sampled_rows is None else device.tensor(sampled_rows),
        sampling=sampling_inputs(sampled_seqs, vocab_size, device) if sampled_seqs else None,
    )


def sampling_inputs(seqs: SequenceOf[Sequence], vocab_size: int, device: Device) -> SamplingInputs:
    """The sampling parameters of one row per request."""
    params = [seq.params for seq in seqs]
    needs_filter = any(p.needs_filter for p in params)
    wanted_logprobs = [p.logprobs for p in params if p.logprobs is not None]

    def column(values: list[float], dtype: type) -> torch.Tensor:
        return device.tensor(np.array(values, dtype=dtype))

    return SamplingInputs(
        temperatures=column([_in_float32_range(p.temperature) for p in params], np.float32),
        seeds=column([seq.seed for seq in seqs], np.int64),
        output_indices=column([seq.num_output_tokens for seq in seqs], np.int64),
        filters=(
            column([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params], np.int64),
            column([p.top_p for p in params], np.float32),
            column([p.min_p for p in params], np.float32),
        )
        if needs_filter
        else None,
        banned=_banned_tokens(seqs, device),
        num_logprobs=max(wanted_logprobs) if wanted_logprobs else None,
    )


def _in_float32_range(temperature: float) -> float:
    """Logits divided by it stay finite; 0 stays 0, and the ends act like greedy and like uniform sampling."""
    return temperature and min(max(temperature, 1e-6), 1e30)


def _banned_tokens(seqs: SequenceOf[Sequence], device: Device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Stop tokens of requests that are still below their `min_tokens`."""
    pairs = [
        (row, token)
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens < seq.params.min_tokens
        for token in seq.stop_token_ids
    ]
    if not pairs:
        return None
    rows, tokens = np.array(pairs, dtype=np.int64).T.copy()
    return device.tensor(rows), device.tensor(tokens)
