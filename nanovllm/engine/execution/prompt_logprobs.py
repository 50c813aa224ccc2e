"""Log-probabilities of prompt tokens: which rows of a prefill step give them, and how they are made of these.

The hidden state of a token predicts the token after it, which the host knows already: also where a chunk ends there.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.scheduling.step import PrefillChunk
from nanovllm.layers.sampler import SampledTokens, logprobs_of

ROWS_AT_A_TIME = 128
"""Rows whose logits exist at the same time: with a large vocabulary those of a whole chunk would take gigabytes."""


@dataclass(frozen=True)
class PromptRows:
    """What a step reports of the prompts of its chunks.

    Attributes:
        rows: [K] int64, the step's tokens whose hidden states predict a token of their prompt.
        token_ids: [K] int64, those prompt tokens.
        num_top: most probable tokens to report beside each of them.
    """

    rows: np.ndarray
    token_ids: np.ndarray
    num_top: int


def prompt_rows(chunks: abc.Sequence[PrefillChunk], first_row: int) -> PromptRows | None:
    """The rows of chunks whose tokens follow each other from `first_row` on; None if no request asks for any."""
    asking, row = [], first_row
    for chunk in chunks:
        if chunk.logprob_positions:
            asking.append((chunk, row))
        row += chunk.num_tokens
    if not asking:
        return None
    rows, token_ids = [], []
    for chunk, row in asking:
        positions = chunk.logprob_positions
        rows.append(row - chunk.start + np.arange(positions.start, positions.stop, dtype=np.int64))
        token_ids.append(np.array(chunk.seq.token_ids[positions.start + 1 : positions.stop + 1], dtype=np.int64))
    num_top = max(chunk.seq.params.prompt_logprobs or 0 for chunk, _ in asking)
    return PromptRows(np.concatenate(rows), np.concatenate(token_ids), num_top)


def prompt_logprobs(hidden: torch.Tensor, asked: PromptRows, forward: ForwardPass) -> SampledTokens:
    """The prompt tokens with their log-probabilities, as those of sampled tokens; all ranks call this together.

    Args:
        hidden: [T, hidden_size] of the step, after the final norm.
        asked: what to report.
        forward: the model.
    """
    rows, token_ids = forward.device.tensor(asked.rows), forward.device.tensor(asked.token_ids)
    parts = []
    for some_rows, some_tokens in zip(rows.split(ROWS_AT_A_TIME), token_ids.split(ROWS_AT_A_TIME), strict=True):
        logits = forward.ranks.all_gather(forward.model.compute_logits(hidden[some_rows]))
        parts.append(logprobs_of(logits.float(), some_tokens, asked.num_top))
    return SampledTokens(token_ids, *(torch.cat(part) for part in zip(*parts, strict=True)))
