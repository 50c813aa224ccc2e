"""Triton kernels against the torch reference on a card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanovllm.kernels import AttentionMetadata, cuda_prefill_attention
from tests.kernel_cases import (
    DECODE,
    MIXED,
    OPTIONAL,
    PREFILL,
    Case,
    check_fused,
    check_rows,
    check_steps,
    make_case,
    mixed_error,
    relative_error,
)

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("spans", [DECODE, PREFILL, [(1, 8000)] * 3, [(1, 300)] * 200, [(600, 5000)]])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(8, 8, 64, 16), (16, 8, 128, 64), (32, 8, 128, 64), (8, 1, 128, 256), (6, 2, 64, 16)],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_equals_reference(spans, num_heads, num_kv_heads, head_dim, block_size, dtype):
    from nanovllm.kernels.triton_attention import Backend

    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = make_case(spans, device="cuda", dtype=dtype, **shape)
    assert relative_error(Backend(), case) < TOLERANCE[dtype]


@pytest.mark.parametrize("with_split", [True, False])
@pytest.mark.parametrize(
    ("rows", "chunks", "num_empty_rows"),
    [*MIXED, ([3000] * 40 + [1], [(512, 4000), (300, 300)], 400), ([700] * 200, [(1, 900)], 0)],
)
@pytest.mark.parametrize("is_beside", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_of_both_parts_equals_reference(rows, chunks, num_empty_rows, with_split, is_beside, dtype):
    from nanovllm.kernels.triton_attention import Backend

    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 64, "device": "cuda"}
    stream = torch.cuda.Stream() if is_beside else None
    options = {"with_split": with_split, "decode_stream": stream, "dtype": dtype, **shape}
    error = mixed_error(Backend(), rows, chunks, num_empty_rows, **options)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize(("has_norm", "has_rope"), OPTIONAL)
@pytest.mark.parametrize("spans", [DECODE, PREFILL, [(1, 3000)] * 3], ids=["decode", "prefill", "long"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (14, 2, 64), (28, 4, 128), (40, 8, 128), (15, 5, 64)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_optional_and_any_head_count_equals_reference(
    dtype, num_heads, num_kv_heads, head_dim, spans, has_norm, has_rope
):
    from nanovllm.kernels.triton_attention import Backend

    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": 64}
    case = make_case(spans, device="cuda", dtype=dtype, has_norm=has_norm, has_rope=has_rope, **shape)
    assert relative_error(Backend(), case) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [64, 576, 896, 1024, 3072, 4096, 12288])
def test_fused_kernels_equal_reference(dtype, size):
    from nanovllm.kernels.triton_attention import Backend

    check_fused(Backend(), device="cuda", dtype=dtype, size=size)


def test_rows_of_a_decode_batch_equal_reference():
    from nanovllm.kernels.triton_attention import Backend

    check_rows(Backend(), device="cuda")


@pytest.mark.parametrize("block_size", [16, 32, 64, 96])
def test_what_steps_leave_in_unused_places_reaches_no_answer(block_size):
    from nanovllm.kernels.triton_attention import Backend

    for seed in range(10):
        check_steps(Backend(), device="cuda", dtype=torch.bfloat16, block_size=block_size, seed=seed)


def test_sampling_from_nan_gives_no_token():
    from nanovllm.kernels.triton_attention import Backend

    logits = torch.full((3, 151_936), float("nan"), device="cuda")
    logits[1, 5] = 1.0
    zeros = torch.zeros(3, dtype=torch.int64, device="cuda")
    for temperature in (0.0, 0.7):
        tokens, _ = Backend().sample_tokens(logits, torch.full((3,), temperature, device="cuda"), zeros, zeros)
        assert tokens.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("num_sms", [1, 8, 48, 1000])
def test_decode_spread_over_any_number_of_sms(num_sms):
    """Twice from the same plan, as every layer does."""
    from nanovllm.kernels.triton_attention import Backend

    backend = Backend()
    spans = [(1, length) for length in (20_000, 1, 33, 32, 31, 700, 5, 96, *range(100, 3000, 70))]
    shape = {"num_heads": 14, "num_kv_heads": 2, "head_dim": 128, "block_size": 64}
    case = make_case(spans, device="cuda", dtype=torch.bfloat16, **shape)
    metadata = replace(case.metadata, num_sms=num_sms)
    case = replace(case, metadata=replace(metadata, work_split=backend.split_work(metadata, 14, case.kv_cache)))
    for _ in range(2):
        assert relative_error(backend, case) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("spans", "num_heads"),
    [
        ([(128, 7000)], 32),
        ([(128, 7000)], 8),
        ([(200, 5003), (16, 900)], 32),
        ([(320, 5003), (16, 900)], 8),
        ([(63, 3000), (200, 200), (1, 12_000)], 8),
        ([(22, 7974), (352, 352)], 32),
        ([(17, 40 * i + 17) for i in range(32)], 32),
        ([(3072, 5000)], 16),
    ],
)
def test_contexts_are_divided_into_pieces(spans, num_heads, monkeypatch):
    from nanovllm.kernels.triton_attention import Backend

    monkeypatch.setattr(cuda_prefill_attention, "can_serve", lambda *_: False)
    shape = {"num_heads": num_heads, "num_kv_heads": 8, "head_dim": 128, "block_size": 64}
    case = make_case(spans, device="cuda", dtype=torch.bfloat16, **shape)
    split = Backend().split_work(case.metadata, num_heads, case.kv_cache)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    counters = split[-(-(8 * num_sms) // num_heads) * -num_heads :]
    case = replace(case, metadata=replace(case.metadata, work_split=split))
    for _ in range(20):  # layers, which count anew
        assert relative_error(Backend(), case) < TOLERANCE[torch.bfloat16]
    assert not counters.any()


LONG_PREFILL = [
    [(128, 128)],
    [(129, 129), (1, 1), (2, 2), (257, 300)],
    [(300, 300), (128, 1000), (1, 700), (513, 1029), (64, 64), (129, 257)],
    [(600, 5000), (3, 40)],
    [(2048, 2048)],
]
"""Tiles of 128 queries and keys that are full, begun, one short of full; of prompts and behind a cached prefix."""


def planned(case: Case, num_heads: int, num_sms: int = 132) -> Case:
    """The case with a plan for the CUDA kernel, however few tokens there are."""
    plan = cuda_prefill_attention.plan(case.metadata, num_heads, case.kv_cache, num_sms)
    return replace(case, metadata=replace(case.metadata, work_split=plan, num_sms=num_sms))


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


on_hopper = pytest.mark.skipif(not has_hopper(), reason="the kernel is for Hopper")


@on_hopper
@pytest.mark.parametrize("spans", [PREFILL, *LONG_PREFILL])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [
        (32, 8, 128, 64),
        (8, 8, 64, 16),
        (4, 1, 128, 16),
        (6, 2, 64, 64),
        (8, 1, 128, 256),
        (14, 2, 128, 96),
        (15, 5, 64, 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefill_in_large_tiles_equals_reference(spans, num_heads, num_kv_heads, head_dim, block_size, dtype):
    from nanovllm.kernels.triton_attention import Backend

    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = planned(make_case(spans, device="cuda", dtype=dtype, **shape), num_heads)
    for _ in range(3):  # layers, which count anew
        assert relative_error(Backend(), case) < TOLERANCE[dtype]
        assert not case.metadata.work_split[0, 0], "the next layer would begin behind the first tiles"


@on_hopper
@pytest.mark.parametrize("num_sms", [1, 7, 48, 1000])
def test_prefill_in_large_tiles_on_any_number_of_sms(num_sms):
    from nanovllm.kernels.triton_attention import Backend

    shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 128, "block_size": 64}
    spans = [(700, 700), (0, 0), (300, 2000), (0, 5), (5, 5)] * 3
    case = planned(make_case(spans, device="cuda", dtype=torch.bfloat16, **shape), 8, num_sms)
    for _ in range(2):
        assert relative_error(Backend(), case) < TOLERANCE[torch.bfloat16]


@on_hopper
def test_prefill_in_large_tiles_of_a_graph_follows_its_inputs():
    """A step of fixed size with room for requests, then others in the same memory; padding is left as it is."""
    from nanovllm.kernels.triton_attention import Backend

    backend, room = Backend(), 1100
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 64}
    steps = [[(1, 1), (1, 1), (1, 1)], [(700, 700), (300, 900), (0, 0)], [(1000, 3000), (0, 0), (0, 0)]]
    cases = [make_case(spans, device="cuda", dtype=torch.bfloat16, seed=i, **shape) for i, spans in enumerate(steps)]
    pool = torch.empty_like(max((case.pool for case in cases), key=len))
    tables = torch.zeros(3, 60, dtype=torch.int32, device="cuda")
    query = torch.empty(room, 32, 128, dtype=torch.bfloat16, device="cuda")
    metadata = replace(
        cases[0].metadata,
        slot_mapping=torch.zeros(room, dtype=torch.int64, device="cuda"),
        block_tables=tables,
        context_lens=cases[0].metadata.context_lens.clone(),
        query_starts=cases[0].metadata.query_starts.clone(),
        max_query_len=room,
    )
    output = torch.empty_like(query)

    def run() -> None:
        split = backend.split_work(metadata, 32, pool[:, 1])
        assert cuda_prefill_attention.is_plan(split)
        for _ in range(2):
            backend.attend(query, pool[:, 1], replace(metadata, work_split=split), 0.09, output)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case in reversed(cases):
        heads = case.store(backend, case.kv_cache)
        pool[: len(case.pool)] = case.pool
        query.fill_(float("nan"))[: len(heads)] = heads
        tables.fill_(10**6)[:, : case.metadata.block_tables.shape[1]] = case.metadata.block_tables
        metadata.context_lens.copy_(case.metadata.context_lens)
        metadata.query_starts.copy_(case.metadata.query_starts)
        output.fill_(7.0)
        graph.replay()
        expected = case.expected(heads, case.kv_cache, 0.09)
        got = output[: len(heads)].double()
        assert (got - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]
        assert (output[len(heads) :] == 7.0).all()


def test_block_offsets_beyond_two_to_the_31_elements():
    """A pool of more than 2^31 elements: 32-bit offsets would wrap around."""
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
    qkv = torch.randn(1, 8 * 128, dtype=torch.bfloat16, device="cuda")
    ones, angles = torch.ones(128, dtype=torch.bfloat16, device="cuda"), torch.zeros(1, 64, device="cuda")
    backend = Backend()
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    query = backend.norm_rotate_store(
        qkv, ones, ones, 1e-6, position, angles.cos(), angles.sin(), pool[:, 1], metadata.slot_mapping
    )
    output = backend.attend(query, pool[:, 1], metadata, 0.1)
    value = qkv.view(8, 128)[6:]
    assert torch.equal(pool[block, 1, 1, :, 0], value)
    assert torch.equal(output[0], value.repeat_interleave(2, dim=0))
    if has_hopper():
        chunk = replace(metadata, max_query_len=2)
        chunk = replace(chunk, work_split=cuda_prefill_attention.plan(chunk, 4, pool[:, 1], 132))
        assert torch.equal(backend.attend(query, pool[:, 1], chunk, 0.1), output)
