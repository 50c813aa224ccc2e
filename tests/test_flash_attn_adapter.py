"""The adapter calls flash-attn as its documentation says; the package itself is stood in for, since it needs a GPU."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from nanovllm.kernels import BackendRequirements, torch_reference
from tests.kernel_cases import DECODE, MIXED, PREFILL, make_case, mixed_error, relative_error


def paged_reference(query, keys, values, lengths, starts, table, scale):
    """Causal attention over token-major pages, aligned to the end of each context, as flash-attn defines it."""
    cache = torch.stack((keys, values), dim=1).transpose(2, 3)
    context_lens = torch.as_tensor(lengths)
    metadata = types.SimpleNamespace(context_lens=context_lens, query_starts=starts, block_tables=table)
    return torch_reference.Backend().attend(query, cache, metadata, scale)


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal):
    assert causal
    assert k_cache.shape[1] % 256 == 0
    starts = torch.arange(len(q) + 1)
    attended = paged_reference(q[:, 0], k_cache, v_cache, cache_seqlens, starts, block_table, softmax_scale)
    return attended[:, None]


def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, block_table
):
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k >= cu_seqlens_k.diff().max()
    return paged_reference(q, k, v, cu_seqlens_k.diff(), cu_seqlens_q, block_table, softmax_scale)


@pytest.fixture
def adapter(monkeypatch):
    package = types.ModuleType("flash_attn")
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delitem(sys.modules, "nanovllm.kernels.flash_attn", raising=False)
    yield importlib.import_module("nanovllm.kernels.flash_attn")
    sys.modules.pop("nanovllm.kernels.flash_attn", None)


@pytest.mark.parametrize("spans", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_adapter_equals_reference(adapter, spans):
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": 256}
    case = make_case(spans, device="cpu", dtype=torch.float32, **shape)
    assert relative_error(adapter.Backend(), case) < 1e-6


@pytest.mark.parametrize(("rows", "chunks", "num_empty_rows"), MIXED)
def test_both_parts_of_a_step_equal_reference(adapter, rows, chunks, num_empty_rows):
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": 256, "device": "cpu"}
    error = mixed_error(adapter.Backend(), rows, chunks, num_empty_rows, with_split=False, dtype=torch.float32, **shape)
    assert error < 1e-6


def test_it_says_what_it_cannot_serve(adapter):
    reasons = adapter.unsupported_reasons(BackendRequirements("cpu", torch.float32, 260, 64))
    assert len(reasons) == 4
    assert adapter.unsupported_reasons(BackendRequirements("cuda", torch.bfloat16, 128, 256)) == []
