"""Triton kernels against the torch reference on a card."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_cases import DECODE, PREFILL, make_case, relative_error

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("spans", [DECODE, PREFILL, [(1, 8000)] * 3, [(1, 300)] * 200, [(600, 5000)]])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (16, 8), (32, 8), (8, 1), (6, 2)])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (128, 64), (128, 256)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_equals_reference(spans, num_heads, num_kv_heads, head_dim, block_size, dtype):
    from nanovllm.kernels.triton_attention import Backend

    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = make_case(spans, device="cuda", dtype=dtype, **shape)
    assert relative_error(Backend(), case) < TOLERANCE[dtype]


def test_block_offsets_beyond_two_to_the_31_elements():
    """A pool of more than 2^31 elements: 32-bit offsets would wrap around."""
    from nanovllm.kernels import AttentionMetadata
    from nanovllm.kernels.triton_attention import Backend

    pool = torch.zeros(70_000, 2, 2, 2, 64, 128, dtype=torch.bfloat16, device="cuda")
    assert pool.numel() > 2**31
    block = pool.shape[0] - 1
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor([block * 64], device="cuda"),
        block_tables=torch.tensor([[block]], dtype=torch.int32, device="cuda"),
        context_lens=torch.tensor([1], dtype=torch.int32, device="cuda"),
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
        max_query_len=1,
        max_context_len=1,
    )
    query, key, value = (torch.randn(1, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
    backend = Backend()
    backend.store_kv(key, value, pool[:, 1], metadata)
    output = backend.attend(query, pool[:, 1], metadata, 0.1)
    assert torch.equal(pool[block, 1, 0, :, 0], key[0])
    assert torch.equal(output[0], value[0].repeat_interleave(2, dim=0))
