"""A thin adapter to the flash-attn package (2.5 or later): paged prefill and decode. All else is plain torch."""

from __future__ import annotations

import flash_attn
import torch

from nanovllm.kernels import AttentionMetadata, BackendRequirements, torch_reference

DEFAULT_BLOCK_SIZE = 256


def unsupported_reasons(needs: BackendRequirements) -> list[str]:
    reasons = []
    if needs.device_type != "cuda":
        reasons.append(f"flash-attn runs on CUDA, not on {needs.device_type}")
    if needs.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"flash-attn takes float16 and bfloat16, not {needs.dtype}")
    if needs.head_dim > 256 or needs.head_dim % 8:
        reasons.append(f"flash-attn takes head dims up to 256 in steps of 8, not {needs.head_dim}")
    if needs.block_size is not None and needs.block_size % 256:
        reasons.append(f"flash-attn takes block sizes that are multiples of 256, not {needs.block_size}")
    if needs.has_scaled_weights:
        reasons.append("the flash-attn adapter has no kernels for FP8 weights")
    if needs.has_experts:
        reasons.append("the flash-attn adapter has no kernels for experts")
    if needs.has_fp8_kv:
        reasons.append("the flash-attn adapter does not read KV in FP8 (kv_cache_dtype='fp8')")
    return reasons


class Backend(torch_reference.Backend):
    name = "flash_attn"
    is_capturable = True
    skips_empty_requests = False

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert kv_scales is None, "KV in FP8 is refused when the backend is chosen"
        # flash-attn's pages are token-major, ours head-major: a transposed view, no copy.
        key_cache, value_cache = kv_cache[:, 0].transpose(1, 2), kv_cache[:, 1].transpose(1, 2)
        if metadata.is_decode:
            output = flash_attn.flash_attn_with_kvcache(
                query.unsqueeze(1),
                key_cache,
                value_cache,
                cache_seqlens=metadata.context_lens,
                block_table=metadata.block_tables,
                softmax_scale=scale,
                causal=True,
            )
            return output.squeeze(1) if out is None else out.copy_(output.squeeze(1))
        lengths = metadata.context_lens.cumsum(0, dtype=torch.int32)
        output = flash_attn.flash_attn_varlen_func(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q=metadata.query_starts,
            cu_seqlens_k=torch.nn.functional.pad(lengths, (1, 0)),
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_context_len,
            softmax_scale=scale,
            causal=True,
            block_table=metadata.block_tables,
        )
        if out is None:
            return output
        is_before = torch.arange(len(query), device=query.device) < metadata.query_starts[0]
        return out.copy_(torch.where(is_before[:, None, None], out, output))
