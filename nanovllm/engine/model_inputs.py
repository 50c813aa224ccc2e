"""Turns a prefill step, and sampling parameters, into tensors. Knows nothing about models or who asked for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.scheduler import PrefillChunk, PrefillStep
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
        mirror_slots: [T] int64, slots of the decode pool in which the KV may be stored as well, -1 for none.
        sampled_rows: [N] int64 rows of T whose logits are wanted.
        sampling: parameters of the N rows, None if N is 0.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    mirror_slots: torch.Tensor
    sampled_rows: torch.Tensor
    sampling: SamplingInputs | None


def prefill_inputs(step: PrefillStep, block_size: int, device: Device) -> ModelInputs:
    """The tensors of a prefill step, whose KV goes to the blocks of each lease's prefill table."""
    chunks = step.rows
    lengths = np.array([chunk.end - chunk.start for chunk in chunks])
    positions = np.concatenate([np.arange(chunk.start, chunk.end, dtype=np.int64) for chunk in chunks])
    tokens = np.concatenate([np.array(c.seq.token_ids[c.start : c.end], dtype=np.int64) for c in chunks])
    tables = np.zeros((len(chunks), max(-(-chunk.end // block_size) for chunk in chunks)), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        num_blocks = -(-chunk.end // block_size)
        tables[row, :num_blocks] = chunk.lease.prefill_table[:num_blocks]
    rows = np.repeat(np.arange(len(chunks)), lengths)
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    ends = np.array([chunk.end for chunk in chunks], dtype=np.int32)
    metadata = AttentionMetadata(
        slot_mapping=device.tensor(slots),
        block_tables=device.tensor(tables),
        context_lens=device.tensor(ends),
        query_starts=device.tensor(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)),
        max_query_len=int(lengths.max()),
        max_context_len=int(ends.max()),
    )
    last_rows = np.cumsum(lengths) - 1
    sampled = np.array([row for row, chunk in zip(last_rows, chunks, strict=True) if chunk.is_last], dtype=np.int64)
    last = [(chunk.seq, chunk.end - chunk.seq.num_prompt_tokens) for chunk in chunks if chunk.is_last]
    return ModelInputs(
        input_ids=device.tensor(tokens),
        positions=device.tensor(positions),
        metadata=metadata,
        mirror_slots=device.tensor(np.concatenate([mirror_slots(chunk, block_size) for chunk in chunks])),
        sampled_rows=device.tensor(sampled),
        sampling=plain_sampling_inputs(last, device) if last else None,
    )


def mirror_slots(chunk: PrefillChunk, block_size: int) -> np.ndarray:
    """[end - start] int64: the slots of a chunk's tokens in the decode pool, -1 where they are not stored there."""
    slots = np.full(chunk.end - chunk.start, -1, dtype=np.int64)
    places = np.arange(chunk.mirrored_from, chunk.end)
    table = np.array(chunk.lease.decode_table, dtype=np.int64)
    slots[chunk.mirrored_from - chunk.start :] = table[places // block_size] * block_size + places % block_size
    return slots


def plain_sampling_inputs(rows: SequenceOf[tuple[Sequence, int]], device: Device) -> SamplingInputs:
    """Temperature, seed and index of a row for each request and index of the output token to be sampled."""
    return SamplingInputs(
        temperatures=device.tensor(np.array([seq.params.float32_temperature for seq, _ in rows], dtype=np.float32)),
        seeds=device.tensor(np.array([seq.seed for seq, _ in rows], dtype=np.int64)),
        output_indices=device.tensor(np.array([index for _, index in rows], dtype=np.int64)),
    )


def sampling_inputs(rows: SequenceOf[tuple[Sequence, int]], vocab_size: int, device: Device) -> SamplingInputs:
    """All sampling parameters of such rows."""
    params = [seq.params for seq, _ in rows]
    filters = None
    if any(p.needs_filter for p in params):
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        filters = (
            device.tensor(np.array(top_k, dtype=np.int64)),
            device.tensor(np.array([p.top_p for p in params], dtype=np.float32)),
            device.tensor(np.array([p.min_p for p in params], dtype=np.float32)),
        )
    wanted_logprobs = [p.logprobs for p in params if p.logprobs is not None]
    return dataclasses.replace(
        plain_sampling_inputs(rows, device),
        filters=filters,
        banned=_banned_tokens(rows, device),
        num_logprobs=max(wanted_logprobs) if wanted_logprobs else None,
    )


def _banned_tokens(rows: SequenceOf[tuple[Sequence, int]], device: Device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Stop tokens of requests that are still below their `min_tokens`."""
    pairs = [
        (row, token)
        for row, (seq, index) in enumerate(rows)
        if index < seq.params.min_tokens
        for token in seq.stop_token_ids
    ]
    if not pairs:
        return None
    places, tokens = np.array(pairs, dtype=np.int64).T.copy()
    return device.tensor(places), device.tensor(tokens)
