"""Every kernel in plain torch: the reference for correctness, on any device. Slow on purpose: one request at a time."""

from __future__ import annotations

import torch
from torch.nn import functional

from nanovllm.kernels import NO_FINITE_TOKEN, AttentionMetadata, BackendRequirements, ExpertWeights, RowField
from nanovllm.utils.fp8 import ScaledTokens, ScaledWeight, dequantized, quantize, quantize_by

DEFAULT_BLOCK_SIZE = 16

_MASK32 = 0xFFFFFFFF
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def unsupported_reasons(needs: BackendRequirements) -> list[str]:
    return []


class Backend:
    name = "torch"
    is_capturable = False
    skips_empty_requests = True

    def norm_rotate_store(
        self,
        qkv: torch.Tensor,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        eps: float,
        positions: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_kv_heads, head_dim = kv_cache.shape[2], kv_cache.shape[4]
        heads = qkv.unflatten(-1, (-1, head_dim))
        query, key, value = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        if query_weight is not None and key_weight is not None:
            query, key = _rms_norm(query, query_weight, eps), _rms_norm(key, key_weight, eps)
        if cos is not None and sin is not None:
            angles = (cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))
            query, key = _rotate(query, *angles), _rotate(key, *angles)
        store_kv(key, value, kv_cache, slot_mapping, kv_scales)
        return query

    def split_work(self, metadata: AttentionMetadata, num_heads: int, kv_cache: torch.Tensor) -> None:
        return None

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        output = torch.empty_like(query) if out is None else out
        starts = metadata.query_starts.tolist()
        for row, context_len in enumerate(metadata.context_lens.tolist()):
            if not context_len:
                continue
            rows = slice(starts[row], starts[row + 1])
            key, value = gather_context(kv_cache, metadata.block_tables[row], context_len, kv_scales)
            output[rows] = _attend_one(query[rows], key, value, scale)
        return output

    def linear(
        self,
        x: torch.Tensor | ScaledTokens,
        weight: torch.Tensor | ScaledWeight,
        bias: torch.Tensor | None,
        num_sms: int | None = None,
    ) -> torch.Tensor:
        assert isinstance(x, torch.Tensor), "this backend passes no quantized tokens from layer to layer"
        if isinstance(weight, ScaledWeight):
            return scaled_linear(x, weight, bias)
        return functional.linear(x, weight, bias)

    def norm_linear(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: tuple[torch.Tensor, float],
        weight: torch.Tensor | ScaledWeight,
        bias: torch.Tensor | None,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = self.add_rms_norm(x, residual, *norm)
        return self.linear(normed, weight, bias), total

    def norm_gated_linear(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: tuple[torch.Tensor, float],
        weight: torch.Tensor | ScaledWeight,
        bias: torch.Tensor | None,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, total = self.norm_linear(x, residual, norm, weight, bias)
        return self.silu_and_mul(gate_up), total

    def norm_experts(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: tuple[torch.Tensor, float],
        experts: ExpertWeights,
        metadata: AttentionMetadata | None = None,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = self.add_rms_norm(x, residual, *norm)
        chosen, weights = route(normed, experts, metadata)
        output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(experts.num_experts):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            gate_up, down = experts.of(expert)
            activated = self.silu_and_mul(self.linear(normed[tokens], gate_up, None))
            results = self.linear(activated, down, None)
            output.index_add_(0, tokens, results.float() * weights[tokens, places, None])
        return output.to(x.dtype), total

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else x + residual
        return _rms_norm(total, weight, eps), total

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def sample_tokens(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        output_indices: torch.Tensor,
        first_token: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        greedy = (temperatures == 0.0).unsqueeze(1)
        noise = gumbel_noise(seeds, output_indices, logits.shape[1], first_token)
        # The division must not make NaN of a greedy row, whose result is not used.
        noisy = logits / torch.where(greedy, 1.0, temperatures.unsqueeze(1)) + noise
        scores, places = torch.where(greedy, logits, noisy).max(dim=-1)  # a NaN, if there is one
        return torch.where(scores.isfinite(), places + first_token, NO_FINITE_TOKEN), scores

    def gather_rows(
        self,
        indices: torch.Tensor,
        fields: torch.Tensor,
        temperatures: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        gathered, tables = fields[:, indices], block_tables[indices]
        positions = gathered[RowField.POSITION]
        blocks = tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
        slot_mapping = blocks.long() * block_size + positions % block_size
        return gathered, temperatures[indices], tables, slot_mapping, (positions + 1).int()

    def advance_rows(
        self,
        indices: torch.Tensor,
        gathered: torch.Tensor,
        token_ids: torch.Tensor,
        fields: torch.Tensor,
        padding_row: int,
    ) -> None:
        fields[RowField.LAST_TOKEN, indices] = token_ids.clamp(min=0)
        fields[RowField.POSITION, indices] = gathered[RowField.POSITION] + 1
        fields[RowField.OUTPUT_INDEX, indices] = gathered[RowField.OUTPUT_INDEX] + 1
        fields[RowField.POSITION, padding_row] = 0


def scaled_linear(x: torch.Tensor, weight: ScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b with x quantized as the format has it: what a card computes, with all products summed in float32.

    Each product of e4m3 values is exact in float32; scales may multiply before the sum or after it, which differs in
    the last bits of float32 alone.
    """
    tokens = dequantized(*quantize(x, 1, weight.block), 1, weight.block)
    return functional.linear(tokens, weight.dequantized(), None if bias is None else bias.float()).to(x.dtype)


def route(
    x: torch.Tensor, experts: ExpertWeights, metadata: AttentionMetadata | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of [T, hidden_size] tokens, [T, top_k] int64, -1 for padding; and their weights, float32."""
    logits = functional.linear(x.float(), experts.router.float())
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : experts.top_k]
    weights = logits.softmax(dim=-1).gather(1, chosen)
    if experts.renormalizes:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if metadata is not None and metadata.padding_slot is not None:
        is_token = (metadata.slot_mapping < metadata.padding_slot).unsqueeze(1)
        chosen = torch.where(is_token, chosen, -1)
    return chosen, weights


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Writes [T, num_kv_heads, head_dim] keys and values to their slots; `kv_scales` are those of `Kernels`."""
    block_size = kv_cache.shape[3]
    if kv_scales is not None:
        key, value = (quantize_by(x, scales[:, None]) for x, scales in zip((key, value), kv_scales, strict=True))
        # torch does not index FP8 on every device; bytes it does.
        key, value, kv_cache = (x.view(torch.uint8) for x in (key, value, kv_cache))
    blocks, places = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[blocks, 0, :, places] = key
    kv_cache[blocks, 1, :, places] = value


def gather_context(
    kv_cache: torch.Tensor, block_table: torch.Tensor, context_len: int, kv_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request, each [num_kv_heads, context_len, head_dim]; float32 where they are scaled."""
    block_size = kv_cache.shape[3]
    blocks = block_table[: -(-context_len // block_size)].long()
    is_scaled, dtype = kv_scales is not None, kv_cache.dtype
    context = (kv_cache.view(torch.uint8) if is_scaled else kv_cache)[blocks].view(dtype)
    context = context.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len]
    if kv_scales is not None:
        context = context.float() * kv_scales[:, :, None, None]
    return context[0], context[1]


def gumbel_noise(
    seeds: torch.Tensor, output_indices: torch.Tensor, num_tokens: int, first_token: int = 0
) -> torch.Tensor:
    """Standard Gumbel noise, [B, num_tokens] float32, of tokens from `first_token` on, for [B] int64 seeds and indices.

    It is a hash of (seed, output index, token id), so that a request draws the same numbers in any batch, on any
    device, and again after it was preempted.
    """
    key = _mix((seeds & _MASK32) ^ 0x9E3779B9)
    key = _mix(key ^ ((seeds >> 32) & _MASK32))
    key = _mix((key + output_indices) & _MASK32).unsqueeze(1)
    token_ids = torch.arange(first_token, first_token + num_tokens, device=seeds.device, dtype=torch.int64)
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


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The last `query.shape[0]` positions attend to all before them and themselves; softmax in float32."""
    query_len, num_heads, _ = query.shape
    num_kv_heads, context_len, _ = key.shape
    key = key.repeat_interleave(num_heads // num_kv_heads, dim=0).float()
    value = value.repeat_interleave(num_heads // num_kv_heads, dim=0).float()
    scores = torch.matmul(query.transpose(0, 1).float(), key.transpose(1, 2)) * scale
    query_positions = torch.arange(context_len - query_len, context_len, device=query.device)
    hidden = torch.arange(context_len, device=query.device)[None, :] > query_positions[:, None]
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.matmul(probabilities, value).transpose(0, 1).to(query.dtype)
