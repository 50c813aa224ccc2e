"""Samples tokens from logits: greedy, temperature, top-k, top-p, min-p, log-probabilities.

Sampling is the Gumbel-max trick: the largest of logits plus Gumbel noise is distributed as their softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels import Kernels
from nanovllm.layers.ranks import Ranks

SORTED_ROWS = 64
"""Rows of logits that are sorted, or turned into log-probabilities, at a time: both need several copies of them."""

IN_PROMPT = 1 << 14
"""Added to the count of a token that is in the prompt."""


@dataclass(frozen=True)
class Penalties:
    """Presence, frequency and repetition penalties of B rows.

    Attributes:
        counts: [N, vocab_size / ranks] int16, how often a row has sampled this rank's tokens, with IN_PROMPT.
        rows: [B] int64, which of the N rows.
        presence, frequency, repetition: [B] float32 each, as in `SamplingParams`.
    """

    counts: torch.Tensor
    rows: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor


@dataclass(frozen=True)
class SamplingInputs:
    """Sampling parameters of B rows, on the device of their logits.

    Attributes:
        temperatures: [B] float32, 0 for greedy rows.
        seeds: [B] int64, the requests' seeds.
        output_indices: [B] int64, how many output tokens each request has before this one.
        filters: top_k [B] int64 (the vocabulary size where unused), top_p and min_p [B] float32; None if no row uses
            them.
        banned: rows and token ids, [N] int64 each, that may not be sampled; None for none.
        biases: rows and token ids, [N] int64 each, and what is added to their logits, [N] float32; None for none.
        penalties: None for none.
        num_logprobs: most probable tokens to report, None for no log-probabilities at all.
    """

    temperatures: torch.Tensor
    seeds: torch.Tensor
    output_indices: torch.Tensor
    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    banned: tuple[torch.Tensor, torch.Tensor] | None = None
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    num_logprobs: int | None = None
    penalties: Penalties | None = None


@dataclass(frozen=True)
class SampledTokens:
    """[B] int64 token ids, negative where the logits are not finite; where asked for, [B] float32 log-probabilities and
    the [B, n] most probable tokens. Those of a prompt, which are given and not sampled, have the same form."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def sample(logits: torch.Tensor, inputs: SamplingInputs, backend: Kernels, ranks: Ranks) -> SampledTokens:
    """Samples one token for each row.

    Args:
        logits: [B, vocab_size / ranks] of any float type, this rank's part of the vocabulary.
        inputs: parameters of the B rows.
        backend: samples by temperature.
        ranks: all of them call this together, and get the same tokens.
    """
    extras = (inputs.filters, inputs.banned, inputs.biases, inputs.num_logprobs, inputs.penalties)
    if all(extra is None for extra in extras):
        arguments = (inputs.temperatures, inputs.seeds, inputs.output_indices, ranks.rank * logits.shape[1])
        return SampledTokens(_best_of_ranks(*backend.sample_tokens(logits, *arguments), ranks))
    chunks = [slice(start, start + SORTED_ROWS) for start in range(0, len(logits), SORTED_ROWS)]
    penalties, penalised = inputs.penalties, logits
    if penalties is not None:
        penalised = torch.cat([_penalised(logits[rows].float(), penalties, rows) for rows in chunks])
    gathered = allowed = ranks.all_gather(penalised)
    if inputs.biases is not None:
        rows_and_tokens, values = inputs.biases[:2], inputs.biases[2]
        allowed = allowed.float().index_put(rows_and_tokens, values, accumulate=True)
    if inputs.banned is not None:
        allowed = allowed.index_put(inputs.banned, allowed.new_full((), float("-inf")))
    if inputs.filters is not None:
        columns = (inputs.temperatures, *inputs.filters)
        allowed = torch.cat([_filter(allowed[rows].float(), *(column[rows] for column in columns)) for rows in chunks])
    drawn, _ = backend.sample_tokens(allowed, inputs.temperatures, inputs.seeds, inputs.output_indices)
    # The sums in filters may differ in the last bit between GPUs, so all ranks take the token of rank 0.
    token_ids = ranks.all_gather(drawn.unsqueeze(1))[:, 0]
    if inputs.num_logprobs is None:
        return SampledTokens(token_ids)
    unpenalised = gathered if penalties is None else ranks.all_gather(logits)
    parts = [logprobs_of(unpenalised[rows].float(), token_ids[rows], inputs.num_logprobs) for rows in chunks]
    return SampledTokens(token_ids, *(torch.cat(part) for part in zip(*parts, strict=True)))


def _best_of_ranks(token_ids: torch.Tensor, scores: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """[B] tokens with the best scores over all ranks; of equal scores the lower token wins, as within a rank."""
    if ranks.size == 1:
        return token_ids
    pairs = torch.stack((scores.view(torch.int32), token_ids.int()), dim=1)
    scores_and_tokens = ranks.all_gather(pairs).view(-1, ranks.size, 2)
    best = scores_and_tokens[..., 0].view(torch.float32).argmax(dim=1, keepdim=True)
    return scores_and_tokens[..., 1].gather(1, best).squeeze(1).long()


def _penalised(logits: torch.Tensor, penalties: Penalties, rows: slice) -> torch.Tensor:
    """Some rows' logits, [n, vocab_size / ranks] float32, with the penalties on them."""
    presence, frequency, repetition = (
        column[rows].unsqueeze(1) for column in (penalties.presence, penalties.frequency, penalties.repetition)
    )
    counts = penalties.counts[penalties.rows[rows]]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(counts != 0, repeated, logits)
    in_output = counts & (IN_PROMPT - 1)
    return logits - frequency * in_output - presence * (in_output > 0)


def logprobs_of(logits: torch.Tensor, token_ids: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of some tokens, and the most probable tokens with theirs.

    Args:
        logits: [B, vocab_size] float32, as the model gives them.
        token_ids: [B] int64.
        count: how many of the most probable tokens.

    Returns:
        [B] float32, [B, count] int64, [B, count] float32.
    """
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(count, dim=-1)
    chosen = token_ids.clamp(min=0).unsqueeze(1)  # a row without finite logits has no token
    return logprobs.gather(1, chosen).squeeze(1), top.indices, top.values


def _filter(
    logits: torch.Tensor, temperatures: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Minus infinity for the tokens that min_p, top_k or top_p (of what top_k leaves) rule out."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = (ordered / torch.where(temperatures == 0.0, 1.0, temperatures).unsqueeze(1)).softmax(dim=-1)
    places = torch.arange(logits.shape[1], device=logits.device)
    keep = (places < top_k.unsqueeze(1)) & (probabilities >= min_p.unsqueeze(1) * probabilities[:, :1])
    kept = torch.where(keep, probabilities, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    top_p = top_p.unsqueeze(1)
    keep &= (kept.cumsum(dim=-1) - kept < top_p) | (top_p >= 1.0)
    keep[:, 0] = True  # whatever rounding makes of the parameters, the most probable token stays
    return logits.scatter(1, order, torch.where(keep, ordered, float("-inf")))
