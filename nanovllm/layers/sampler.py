"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, log-probabilities.

Random numbers are a hash of (request seed, output index, token id), so a request draws the same ones in any batch,
on any device, and again after it was preempted. Sampling is the Gumbel-max trick: the largest of logits plus Gumbel
noise is distributed as their softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MASK32 = 0xFFFFFFFF
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


@dataclass(frozen=True)
class SamplingInputs:
    """Sampling parameters of B rows, on the device of their logits.

    Attributes:
        temperatures: [B] float32, 0 for greedy rows; None if all are.
        seeds: [B] int64, the requests' seeds.
        output_indices: [B] int64, how many tokens each request has sampled before.
        filters: top_k [B] int64 (the vocabulary size where unused), top_p and min_p [B] float32; None if no row
            filters.
        banned: rows and token ids, [N] int64 each, that may not be sampled; None for none.
        num_logprobs: most probable tokens to report, None for no log-probabilities at all.
    """

    temperatures: torch.Tensor | None
    seeds: torch.Tensor
    output_indices: torch.Tensor
    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    banned: tuple[torch.Tensor, torch.Tensor] | None = None
    num_logprobs: int | None = None


@dataclass(frozen=True)
class SampledTokens:
    """[B] int64 token ids; where asked for, [B] float32 log-probabilities and the [B, n] most probable tokens."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def sample(logits: torch.Tensor, inputs: SamplingInputs) -> SampledTokens:
    """One token for each row of `logits`, [B, vocab_size] of any float type."""
    logits = logits.float()
    allowed = logits
    if inputs.banned is not None:
        allowed = logits.index_put(inputs.banned, torch.tensor(float("-inf"), device=logits.device))
    token_ids = allowed.argmax(dim=-1)
    if inputs.temperatures is not None:
        greedy = inputs.temperatures == 0.0
        # The division must not make NaN of a greedy row, whose result is not used.
        scaled = allowed / torch.where(greedy, 1.0, inputs.temperatures).unsqueeze(1)
        if inputs.filters is not None:
            scaled = _filter(scaled, *inputs.filters)
        noisy = scaled + gumbel_noise(inputs.seeds, inputs.output_indices, logits.shape[1])
        token_ids = torch.where(greedy, token_ids, noisy.argmax(dim=-1))
    if inputs.num_logprobs is None:
        return SampledTokens(token_ids)
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(inputs.num_logprobs, dim=-1)
    return SampledTokens(token_ids, logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1), top.indices, top.values)


def gumbel_noise(seeds: torch.Tensor, output_indices: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, [B, vocab_size] float32, of [B] int64 seeds and output indices."""
    key = _mix((seeds & _MASK32) ^ 0x9E3779B9)
    key = _mix(key ^ ((seeds >> 32) & _MASK32))
    key = _mix((key + output_indices) & _MASK32).unsqueeze(1)
    token_ids = torch.arange(vocab_size, device=seeds.device, dtype=torch.int64)
    bits = _mix(_mix(((token_ids * 0x9E3779B1) & _MASK32) ^ key) ^ _mix(key ^ 0x85EBCA6B))
    # All 32 bits: the tokens that win are those with the smallest exponentials, which need the resolution near 0.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=_LARGEST_BELOW_ONE)
    exponential = -torch.log1p(-uniform)
    return -exponential.log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of 32-bit integers held in int64 (C. Wellons' lowbias32 constants)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _filter(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Minus infinity for the tokens that min_p, top_k or top_p (of what top_k leaves) rule out."""
    ordered, order = scaled.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    ranks = torch.arange(scaled.shape[1], device=scaled.device)
    keep = (ranks < top_k.unsqueeze(1)) & (probabilities >= min_p.unsqueeze(1) * probabilities[:, :1])
    kept = torch.where(keep, probabilities, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    top_p = top_p.unsqueeze(1)
    keep &= (kept.cumsum(dim=-1) - kept < top_p) | (top_p >= 1.0)
    keep[:, 0] = True  # whatever rounding makes of the parameters, the most probable token stays
    return scaled.scatter(1, order, torch.where(keep, ordered, float("-inf")))
