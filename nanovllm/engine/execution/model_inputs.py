"""The tensors of a forward pass, and sampling parameters as tensors."""

from __future__ import annotations

import itertools
from collections import abc
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.scheduling.step import BlockPart
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.sampler import Penalties, SamplingInputs
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.device import Device


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass over T tokens, of which N are followed by a sampled token.

    Attributes:
        input_ids, positions: [T] int64.
        metadata: where the tokens' KV is.
        sampled_rows: [N] int64 rows of T whose logits are wanted.
        sampling: parameters of the N rows, None if N is 0.
        pushed_blocks: the parts of blocks that go to another runner's pool layer by layer, as in `block_list`; None for
            none.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampled_rows: torch.Tensor
    sampling: SamplingInputs | None
    pushed_blocks: torch.Tensor | None = None


def block_list(parts: abc.Sequence[BlockPart]) -> np.ndarray:
    """[1 + 4N] int64: how many parts of blocks there are, and the parts."""
    return np.array([len(parts), *itertools.chain.from_iterable(parts)], dtype=np.int64)


@dataclass(frozen=True)
class SamplingArrays:
    """`SamplingInputs` on the host."""

    temperatures: np.ndarray
    seeds: np.ndarray
    output_indices: np.ndarray
    filters: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    banned: tuple[np.ndarray, np.ndarray] | None
    biases: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    penalties: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    """Presence, frequency, repetition, without the counts that they go by."""
    num_logprobs: int | None

    def on(self, device: Device, counts: torch.Tensor | None, rows: torch.Tensor | None) -> SamplingInputs:
        """On a device; `counts` and `rows` are those of `Penalties`, None if there are no penalties."""
        penalties = None
        if self.penalties is not None:
            assert counts is not None, "a request with penalties has its tokens counted"
            assert rows is not None, "a request with penalties has a row of counts"
            penalties = Penalties(counts, rows, *map(device.tensor, self.penalties))
        filters, banned, biases = self.filters, self.banned, self.biases
        return SamplingInputs(
            device.tensor(self.temperatures),
            device.tensor(self.seeds),
            device.tensor(self.output_indices),
            None if filters is None else tuple(map(device.tensor, filters)),  # type: ignore[arg-type] # as many
            None if banned is None else tuple(map(device.tensor, banned)),  # type: ignore[arg-type] # as many
            None if biases is None else tuple(map(device.tensor, biases)),  # type: ignore[arg-type] # as many
            self.num_logprobs,
            penalties,
        )


def sampling_arrays(rows: abc.Sequence[tuple[Sequence, int]], vocab_size: int) -> SamplingArrays:
    """All sampling parameters of some rows.

    Args:
        rows: for each row, its request and the index of the output token to sample.
        vocab_size: `top_k` of rows that do not use it.
    """
    params = [seq.params for seq, _ in rows]
    filters = None
    if any(p.needs_filter for p in params):
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        filters = (
            np.array(top_k, dtype=np.int64),
            np.array([p.top_p for p in params], dtype=np.float32),
            np.array([p.min_p for p in params], dtype=np.float32),
        )
    wanted_logprobs = [p.logprobs for p in params if p.logprobs is not None]
    return SamplingArrays(
        temperatures=np.array([p.float32_temperature for p in params], dtype=np.float32),
        seeds=np.array([seq.seed for seq, _ in rows], dtype=np.int64),
        output_indices=np.array([index for _, index in rows], dtype=np.int64),
        filters=filters,
        banned=_banned_tokens(rows),
        biases=_biases(params),
        penalties=_penalties(params),
        num_logprobs=max(wanted_logprobs) if wanted_logprobs else None,
    )


def _banned_tokens(rows: abc.Sequence[tuple[Sequence, int]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Stop tokens of requests that are still below their `min_tokens`."""
    pairs = [
        (row, token)
        for row, (seq, index) in enumerate(rows)
        if index < seq.params.min_tokens
        for token in seq.stop_token_ids
    ]
    if not pairs:
        return None
    banned_rows, tokens = np.array(pairs, dtype=np.int64).T.copy()
    return banned_rows, tokens


def _penalties(params: abc.Sequence[SamplingParams]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    if not any(p.needs_counts for p in params):
        return None
    columns = zip(*((p.presence_penalty, p.frequency_penalty, p.repetition_penalty) for p in params), strict=True)
    presence, frequency, repetition = (np.array(column, dtype=np.float32) for column in columns)
    return presence, frequency, repetition


def _biases(params: abc.Sequence[SamplingParams]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Rows, token ids, and what is added to their logits."""
    triples = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.biases]
    if not triples:
        return None
    biased_rows, tokens, values = zip(*triples, strict=True)
    return np.array(biased_rows, dtype=np.int64), np.array(tokens, dtype=np.int64), np.array(values, dtype=np.float32)


def largest_step(
    device: torch.device, *, num_tokens: int, num_rows: int, block_size: int, max_model_len: int, vocab_size: int
) -> ModelInputs:
    """The inputs of a prefill step of `num_tokens` tokens and `num_rows` sampled rows, to measure its memory.

    All tokens are read from and written to block 0.
    """
    lengths = torch.full((num_rows,), num_tokens // num_rows, dtype=torch.int32, device="cpu")
    lengths[0] += num_tokens - int(lengths.sum())
    positions = torch.cat([torch.arange(n, device="cpu") for n in lengths.tolist()]) % max_model_len
    longest = int(lengths.max())
    metadata = AttentionMetadata(
        slot_mapping=(positions % block_size).to(device),
        block_tables=torch.zeros(num_rows, -(-longest // block_size), dtype=torch.int32, device=device),
        context_lens=lengths.to(device),
        query_starts=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device),
        max_query_len=longest,
        max_context_len=longest,
    )
    sampling = SamplingInputs(
        temperatures=torch.ones(num_rows, dtype=torch.float32, device=device),
        seeds=torch.arange(num_rows, device=device),
        output_indices=torch.zeros(num_rows, dtype=torch.int64, device=device),
        filters=(
            torch.full((num_rows,), vocab_size, device=device),
            torch.full((num_rows,), 0.9, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.float32, device=device),
        ),
        num_logprobs=1,
    )
    token_ids = torch.zeros(len(positions), dtype=torch.int64, device=device)
    rows = metadata.query_starts[1:].long() - 1
    return ModelInputs(token_ids, positions.to(device), metadata, rows, sampling)
