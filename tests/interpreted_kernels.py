"""The Triton kernels in Triton's interpreter, against the torch reference. Run by test_triton.py, in its own process:
`TRITON_INTERPRET` is read when a kernel is defined. bfloat16 is left out: the interpreter gets it wrong."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from tests.expert_cases import (
    Sizes,
    check_all_to_one,
    check_experts,
    check_not_finite,
    check_ties,
    make_experts,
    make_metadata,
)
from tests.fp8_cases import check_counters, check_fp8_fused, check_fp8_linear, relative_difference
from tests.kernel_cases import (
    DECODE,
    MIXED,
    OPTIONAL,
    PREFILL,
    check_fp8_store,
    check_fused,
    check_rows,
    check_steps,
    make_case,
    mixed_error,
    relative_error,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton.py"
from nanovllm.kernels import (  # noqa: E402 - only once the mode is known
    AttentionMetadata,
    ExpertWeights,
    triton_attention,
    triton_experts,
    triton_fp8,
    triton_one_token,
)
from nanovllm.kernels.triton_attention import Backend  # noqa: E402
from nanovllm.utils.fp8 import Fp8Format  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
F32, F16 = TOLERANCE


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(params=[True, False], ids=["tma", "pointers"])
def has_tma(request, monkeypatch):
    """The interpreter plays the tensor memory accelerator too."""
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: request.param)


SHAPES = pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [slow(2, 2, 64, 16, F32), (8, 2, 64, 32, F16), (8, 2, 64, 32, F32), slow(6, 2, 128, 64, F16)],
)


@pytest.mark.parametrize("spans", [DECODE, PREFILL], ids=["decode", "prefill"])
@SHAPES
def test_attention_equals_reference(has_tma, spans, dtype, num_heads, num_kv_heads, head_dim, block_size):
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = make_case(spans, device="cpu", dtype=dtype, **shape)
    assert relative_error(Backend(), case) < TOLERANCE[dtype]


@pytest.mark.parametrize(("has_norm", "has_rope"), OPTIONAL)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dtype"), [(9, 3, F32), (14, 2, F16), (5, 5, F32)])
def test_what_is_optional_and_any_head_count_equals_reference(
    monkeypatch, num_heads, num_kv_heads, dtype, has_norm, has_rope
):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": 64, "block_size": 32}
    for spans in ([(1, 1), (1, 33), (1, 90)], [(5, 5), (16, 40), (33, 33)]):
        case = make_case(spans, device="cpu", dtype=dtype, has_norm=has_norm, has_rope=has_rope, **shape)
        assert relative_error(Backend(), case) < TOLERANCE[dtype]


@pytest.mark.parametrize("with_split", [True, False])
@pytest.mark.parametrize(("rows", "chunks", "num_empty_rows"), MIXED)
def test_attention_of_both_parts_equals_reference(monkeypatch, rows, chunks, num_empty_rows, with_split):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: with_split)
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 32, "device": "cpu"}
    error = mixed_error(Backend(), rows, chunks, num_empty_rows, with_split=with_split, dtype=torch.float16, **shape)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("num_sms", [1, 2, 9, 40])
def test_decode_spread_over_any_number_of_sms(monkeypatch, num_sms):
    """From a program for each head to several, whose chunks the last of them combines."""
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    spans = [(1, length) for length in (64, 1, 33, 32, 31, 700, 5, 96)]
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 32}
    case = make_case(spans, device="cpu", dtype=torch.float16, **shape)
    case = replace(case, metadata=replace(case.metadata, num_sms=num_sms))
    assert relative_error(Backend(), case) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("has_rows", [False, True])
def test_contexts_are_divided_into_fewer_pieces_beside_decode_rows(has_rows):
    """Else the pieces that find no SM beside the rows' programs would run after all others."""
    spans, shape = [(33, 1700)], {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 64}
    case = make_case(spans, device="cpu", dtype=F16, **shape)
    metadata = replace(case.metadata, num_sms=8, decode=case.metadata if has_rows else None)
    plan = Backend().split_work(metadata, 4, case.kv_cache)
    assert plan[0] == (2 if has_rows else 3)


@pytest.mark.parametrize(
    ("chunk", "prefix", "rows", "num_pieces"),
    [
        (124, 2048, [4096] * 4, 4),
        (224, 2048, [4096] * 4, 4),
        (224, 4096, [4096] * 4, 4),
        (224, 7168, [4096] * 4, 8),
        (224, 7168, [6144], 8),
        (124, 7168, [1024] * 32, 4),
    ],
)
def test_pieces_beside_decode_rows_are_as_many_as_end_first_on_a_gpu(chunk, prefix, rows, num_pieces):
    """The faster of both divisions on an H200: docs/records/benchmarks.md, "Kernels"."""
    requests = 32
    context_lens = torch.tensor([prefix + chunk] + [0] * (requests - 1), dtype=torch.int32)
    query_starts = torch.tensor([len(rows)] + [len(rows) + chunk] * requests, dtype=torch.int32)
    slots, tables = torch.zeros(256, dtype=torch.int64), torch.zeros(requests, 8, dtype=torch.int32)
    metadata = AttentionMetadata(slots, tables, context_lens, query_starts, chunk, prefix + chunk, num_sms=132)
    context_of_rows = torch.tensor(rows + [0] * (256 - len(rows)), dtype=torch.int32)
    metadata = replace(metadata, decode=replace(metadata, context_lens=context_of_rows))
    assert Backend().split_work(metadata, 32, torch.zeros(1, 2, 8, 64, 128, dtype=F16))[0] == num_pieces


@pytest.mark.parametrize(
    ("spans", "num_sms", "num_splits", "dtype"),  # float32 is loaded by pointers
    [
        ([(33, 700)], 2, [1], F32),  # as many as heads
        ([(33, 1700)], 8, [4], F16),
        slow([(33, 1700)], 8, [4], F32),
        slow([(70, 1800), (5, 300), (64, 64)], 16, [3, 3, 1, 1], F16),
        slow([(22, 2500), (130, 130)], 40, [5, 1, 1, 1], F16),
        slow([(2, 2000)] * 2, 20, [4] * 2, F16),
        ([(2, 900)] * 3, 2, [1] * 3, F16),
        ([(64, 200), (1, 191)], 40, [1, 1], F32),  # too short
    ],
)
def test_contexts_are_divided_into_pieces(monkeypatch, spans, num_sms, num_splits, dtype):
    """So many that the step ends first; whichever of a tile's is the last to end combines them."""
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    monkeypatch.setattr(triton_attention, "SPLIT_KEYS", 192)
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 64}
    case = make_case(spans, device="cpu", dtype=dtype, **shape)
    case = replace(case, metadata=replace(case.metadata, num_sms=num_sms))
    plan = Backend().split_work(case.metadata, 4, case.kv_cache)
    case = replace(case, metadata=replace(case.metadata, work_split=plan))
    most_pieces = triton_attention._most_tiles(case.metadata) + 2 * num_sms
    pieces = plan[1 : 1 + 7 * most_pieces].view(7, -1)[:, : plan[0]].T.tolist()
    found = [[piece for piece in pieces if piece[1] == first] for first in sorted({piece[1] for piece in pieces})]
    assert [len(of_tile) for of_tile in found] == num_splits
    for of_tile in found:
        assert [piece[5] for piece in of_tile] == list(range(len(of_tile)))
        assert {piece[4] for piece in of_tile} == {len(of_tile)}
    counters = plan[1 + 7 * most_pieces :]
    for _ in range(2):  # layers, which count anew
        assert not counters.any()
        assert relative_error(Backend(), case) < TOLERANCE[dtype]
    assert not counters.any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32 by pointers", "float16 by tma"])
def test_prompts_of_many_tiles_have_a_program_for_each(monkeypatch, dtype):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    monkeypatch.setattr(triton_attention, "MOST_PLANNED_TILES", 2)
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 32}
    case = make_case(PREFILL, device="cpu", dtype=dtype, **shape)
    assert len(Backend().split_work(case.metadata, 8, case.kv_cache)) == len(PREFILL) + 1
    assert relative_error(Backend(), case) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
@pytest.mark.parametrize("words", [6, 3 * 256 + 4])
def test_push_moves_exactly_the_listed_blocks(words, dtype):
    from nanovllm.kernels.triton_transfer import push_blocks

    source = torch.randn(7, 2, 2, 8, words, dtype=dtype)
    target = torch.zeros(9, 2, 2, 8, words, dtype=dtype)
    parts = [(6, 0, 0, 8), (2, 8, 0, 8), (0, 3, 0, 8), (1, 1, 0, 8)]
    blocks = torch.tensor([3, *itertools.chain.from_iterable(parts)])  # the fourth is of an earlier step
    push_blocks(source, target, blocks, 4)
    assert torch.equal(target[[0, 8, 3]], source[[6, 2, 0]])
    assert not target[[1, 2, 4, 5, 6, 7]].any()
    push_blocks(source[:, 1], target[:, 0], blocks, 4)  # of one layer
    assert torch.equal(target[[0, 8, 3], 0], source[[6, 2, 0], 1])
    assert torch.equal(target[[0, 8, 3], 1], source[[6, 2, 0], 1])
    target.zero_()
    parts = [(6, 0, 3, 8), (2, 8, 0, 5), (0, 3, 2, 4)]
    push_blocks(source, target, torch.tensor([3, *itertools.chain.from_iterable(parts)]), 4)
    expected = torch.zeros_like(target)
    for block, target_block, first, end in parts:
        expected[target_block, ..., first:end, :] = source[block, ..., first:end, :]
    assert torch.equal(target, expected)


@pytest.mark.parametrize(("size", "dtype"), [(64, F32), (64, F16), slow(576, F32), slow(600, F16)])
def test_fused_kernels_equal_reference(dtype, size):
    check_fused(Backend(), device="cpu", dtype=dtype, size=size)


def test_rows_of_a_decode_batch_equal_reference():
    check_rows(Backend(), device="cpu")


@pytest.mark.parametrize("block_size", [32, slow(48), slow(96)])
def test_what_steps_leave_in_unused_places_reaches_no_answer(monkeypatch, block_size):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    check_steps(Backend(), device="cpu", dtype=torch.float16, block_size=block_size, seed=block_size)


@pytest.fixture
def rounds_to_fp8(monkeypatch):
    """The interpreter loses a carry where it rounds to e4m3 (127 becomes 64): torch rounds in its place."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(values, from_type, to_type, rounding_mode):
        if (from_type, to_type) != (tl.float32, tl.float8e4nv):
            return theirs(values, from_type, to_type, rounding_mode)
        rounded = torch.from_numpy(np.frombuffer(values.tobytes(), np.float32).copy()).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


FP8_SHAPES = [
    (1, (192, 512), F32),
    (1, (192, 512), F16),
    (5, (130, 2048), F16),
    (17, (70, 200), F32),
    slow(33, (256, 1024), F32),
    (64, (128, 1024), F16),
    slow(130, (200, 300), F16),
]


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize(("num_tokens", "sizes", "dtype"), FP8_SHAPES)
def test_fp8_linear_equals_float64(num_tokens, sizes, block, dtype):
    shape = {"num_tokens": num_tokens, "sizes": sizes, "block": block}
    check_fp8_linear(Backend(), device="cpu", dtype=dtype, tolerance=TOLERANCE[dtype], **shape)


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("num_sms", [1, 3, 20])
@pytest.mark.parametrize("block", [None, 128])
def test_inputs_are_split_among_programs_for_any_number_of_sms(num_sms, block):
    planned = triton_fp8.plan(3, 100, 4096, num_sms, block)
    assert planned.splits == {1: 1, 3: 3, 20: 10 if block is None else 16}[num_sms]
    shape = {"num_tokens": 3, "sizes": (100, 4096), "block": block, "num_sms": num_sms}
    check_fp8_linear(Backend(), device="cpu", dtype=torch.float32, tolerance=1e-5, **shape)


@pytest.mark.parametrize("block", [None, 128])
def test_layers_leave_their_counters_as_they_were(block):
    check_counters(3, (100, 4096), block, device="cpu", num_sms=8)


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize(("num_tokens", "size", "dtype"), [(1, 192, F32), (3, 128, F16), slow(70, 256, F32)])
def test_fp8_norm_and_gate_equal_the_reference(num_tokens, size, block, dtype):
    check_fp8_fused(Backend(), device="cpu", dtype=dtype, block=block, num_tokens=num_tokens, size=size)


@pytest.mark.usefixtures("rounds_to_fp8")
def test_many_tokens_are_for_torch_where_it_has_the_format(monkeypatch):
    """Its arguments are checked on CPUs, where it takes the same; a card has it for blocks, too."""
    assert triton_fp8._capability(torch.device("cpu")) == (0, 0)
    monkeypatch.setattr(triton_fp8, "_capability", lambda device: (9, 0))
    calls = []
    scaled_mm = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **options: calls.append(1) or scaled_mm(*args, **options))
    monkeypatch.setattr(triton_fp8, "_scaled_linear", None)
    shape = {"num_tokens": 65, "sizes": (48, 64), "block": None}
    check_fp8_linear(Backend(), device="cpu", dtype=torch.bfloat16, tolerance=4e-3, **shape)
    assert len(calls) == 4
    for changes in ({"num_sms": 8}, {"num_tokens": 64}, {"sizes": (40, 64)}, {"block": 128}):
        options = {**shape, **changes}
        with pytest.raises(TypeError, match="NoneType"):
            check_fp8_linear(Backend(), device="cpu", dtype=torch.bfloat16, tolerance=4e-3, **options)


TOLERANCE_OF_FP8 = {torch.float32: 1e-3, torch.float16: 12e-3}
# Experts, of which each token passes some: one token, an odd number of experts, some without tokens, tiles of 16 to 128
# assignments, padding at any place, a router whose inputs are split among programs.
EXPERTS = [
    (Sizes(8, 2, 64, 32), 5, [3], F16),
    (Sizes(5, 3, 272, 36, renormalizes=False), 37, [0, 35, 36], F32),
    (Sizes(20, 4, 272, 40, renormalizes=False), 1, None, F32),
    (Sizes(20, 4, 272, 40, renormalizes=False), 1, None, F16),
    (Sizes(4, 2, 64, 200), 130, list(range(60, 130)), F16),
    (Sizes(3, 3, 64, 32), 20, list(range(20)), F32),
]


@pytest.mark.parametrize(("sizes", "num_tokens", "padding", "dtype"), EXPERTS)
def test_experts_equal_float64(sizes, num_tokens, padding, dtype):
    shape = {"num_tokens": num_tokens, "padding": padding, "has_residual": num_tokens > 1}
    check_experts(Backend(), sizes, device="cpu", dtype=dtype, tolerance=2 * TOLERANCE[dtype], **shape)


# Rows of padding are not written: what is quantized of them may be anything, and is not read.
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize(
    ("sizes", "num_tokens", "padding", "dtype"),
    [
        (Sizes(8, 2, 256, 128), 20, [3], F16),
        (Sizes(4, 2, 384, 256, renormalizes=False), 70, [], F32),
        (Sizes(4, 1, 128, 384), 1, None, F32),
        (Sizes(4, 1, 128, 384), 1, None, F16),
    ],
)
@pytest.mark.parametrize("block", [None, 128])
def test_fp8_experts_equal_float64(sizes, num_tokens, padding, block, dtype):
    """Inputs of either GEMM that are not quantized, or otherwise, would change all results by 2 to 4 %."""
    shape = {"num_tokens": num_tokens, "padding": padding, "quantization": Fp8Format(block)}
    check_experts(Backend(), sizes, device="cpu", dtype=dtype, tolerance=TOLERANCE_OF_FP8[dtype], **shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
def test_experts_that_tie_and_one_for_all_tokens(dtype):
    check_ties(Backend(), device="cpu", dtype=dtype)
    for num_tokens in (1, 16, 130):
        check_all_to_one(Backend(), device="cpu", dtype=dtype, num_tokens=num_tokens)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of numpy, which computes here
@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("quantization", [None, Fp8Format(), Fp8Format(128)], ids=["wide", "channel", "block"])
def test_a_token_that_is_not_finite_spoils_itself_alone(quantization):
    check_not_finite(Backend(), device="cpu", dtype=torch.float32, quantization=quantization)


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize(("num_experts", "quantization"), [(6, None), (20, Fp8Format(128))], ids=["wide", "block"])
def test_experts_of_one_token_equal_those_of_many(num_experts, quantization):
    """The same token by itself, by the kernels for one, and among others; as padding, it gives 0."""
    sizes = Sizes(num_experts, 3, 128, 128)
    experts = make_experts(sizes, device="cpu", dtype=torch.float32, quantization=quantization)
    norm = torch.ones(128), 1e-6
    x, residual = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(5)).unbind()
    together, totals = Backend().norm_experts(x, residual, norm, experts)
    for token in range(3):
        row = slice(token, token + 1)
        alone, total = Backend().norm_experts(x[row], residual[row], norm, experts, make_metadata(1, [], "cpu"))
        assert relative_difference(alone, together[row]) < 1e-2
        torch.testing.assert_close(total, totals[row])
    padding, _ = Backend().norm_experts(x[:1], residual[:1], norm, experts, make_metadata(1, [0], "cpu"))
    assert not padding.any()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of numpy, which computes here
@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("quantization", [None, Fp8Format(), Fp8Format(128)], ids=["wide", "channel", "block"])
def test_one_token_that_is_not_finite_shows(quantization):
    """NaN outputs of the router show, too, though none is larger than another."""
    experts = make_experts(Sizes(8, 3, 256, 128), device="cpu", dtype=torch.float32, quantization=quantization)
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 256)
        x[0, 7] = value
        output, _ = Backend().norm_experts(x, None, (torch.ones(256), 1e-6), experts)
        assert not output.isfinite().any()


@pytest.mark.usefixtures("rounds_to_fp8")
def test_what_is_too_wide_for_the_registers_of_one_program_is_left_to_the_kernels_of_many():
    assert triton_one_token.can_serve(1, triton_one_token.MAX_INPUTS)
    assert not triton_one_token.can_serve(1, triton_one_token.MAX_INPUTS + 1)
    assert not triton_one_token.can_serve(2, 64)
    router = torch.empty(8, 64)
    for top_k, between, is_served in ((2, 8192, True), (2, 8200, False), (3, 8192, False)):
        experts = ExpertWeights(router, torch.empty(8 * 2 * between, 64), torch.empty(8 * 64, between), top_k, True)
        assert triton_one_token.can_serve_experts(1, experts) == is_served
    check_fp8_linear(
        Backend(), device="cpu", dtype=torch.float32, block=None, num_tokens=1, sizes=(16, 16640), tolerance=1e-5
    )


def test_a_layer_of_experts_has_programs_for_all_tiles():
    """Whatever the routing: all tokens to few experts, or to as many as there are."""
    generator = torch.Generator().manual_seed(0)
    for num_experts, top_k, num_tokens in ((8, 2, 3), (128, 8, 1), (128, 8, 64), (128, 8, 2048), (5, 3, 7)):
        for tile in (16, 64, 128):
            most = triton_experts.most_tiles(num_tokens * top_k, num_experts, tile)
            for bias in (0.0, 1.0, 10.0):
                scores = torch.rand(num_tokens, num_experts, generator=generator)
                scores += bias * torch.linspace(0, 1, num_experts)
                counts = scores.topk(top_k).indices.flatten().bincount(minlength=num_experts)
                assert ((counts + tile - 1) // tile).sum() <= most


# KV in FP8


@pytest.mark.usefixtures("rounds_to_fp8", "has_tma")
@pytest.mark.parametrize("spans", [DECODE, PREFILL], ids=["decode", "prefill"])
@SHAPES
def test_attention_to_fp8_kv_equals_float64(spans, dtype, num_heads, num_kv_heads, head_dim, block_size):
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = make_case(spans, device="cpu", dtype=dtype, has_fp8_kv=True, **shape)
    assert relative_error(Backend(), case) < TOLERANCE[dtype]


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("with_split", [True, False])
@pytest.mark.parametrize(("rows", "chunks", "num_empty_rows"), MIXED)
def test_attention_of_both_parts_to_fp8_kv_equals_float64(monkeypatch, rows, chunks, num_empty_rows, with_split):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: with_split)
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 64, "device": "cpu", "has_fp8_kv": True}
    error = mixed_error(Backend(), rows, chunks, num_empty_rows, with_split=with_split, dtype=torch.float16, **shape)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("num_sms", [1, 9, 40])
@pytest.mark.parametrize("spans", [[64, 1, 33, 32, 31, 700, 5, 96], [65, 700, 64]], ids=["many", "few"])
def test_decode_on_fp8_kv_spread_over_any_number_of_sms(monkeypatch, spans, num_sms):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 64, "has_fp8_kv": True}
    case = make_case([(1, length) for length in spans], device="cpu", dtype=torch.float16, **shape)
    case = replace(case, metadata=replace(case.metadata, num_sms=num_sms))
    assert relative_error(Backend(), case) < TOLERANCE[torch.float16]


@pytest.mark.usefixtures("rounds_to_fp8")
def test_prompts_on_fp8_kv_are_divided_into_pieces(monkeypatch):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    monkeypatch.setattr(triton_attention, "SPLIT_KEYS", 192)
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 64, "has_fp8_kv": True}
    case = make_case([(70, 1800), (5, 300), (64, 64)], device="cpu", dtype=torch.float16, **shape)
    case = replace(case, metadata=replace(case.metadata, num_sms=16))
    plan = case.split(Backend(), case.metadata, 4)
    assert plan[0] > 4
    for _ in range(2):
        assert relative_error(Backend(), replace(case, metadata=replace(case.metadata, work_split=plan))) < 2e-3


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
def test_what_is_stored_in_fp8_saturates_and_shows_what_is_not_finite(dtype):
    check_fp8_store(Backend(), device="cpu", dtype=dtype)


@pytest.mark.usefixtures("rounds_to_fp8")
@pytest.mark.parametrize("block_size", [32, slow(96)])
def test_what_steps_leave_in_unused_places_of_fp8_reaches_no_answer(monkeypatch, block_size):
    monkeypatch.setattr(triton_attention, "_has_tma", lambda device: True)
    options = {"block_size": block_size, "seed": block_size, "has_fp8_kv": True}
    check_steps(Backend(), device="cpu", dtype=torch.float16, **options)


def test_push_moves_exactly_the_listed_blocks_of_fp8():
    from nanovllm.kernels.triton_transfer import push_blocks

    source = torch.randint(256, (7, 2, 2, 8, 64), dtype=torch.uint8).view(torch.float8_e4m3fn)
    target = torch.zeros(9, 2, 2, 8, 64, dtype=torch.float8_e4m3fn)
    push_blocks(source, target, torch.tensor([2, 6, 0, 0, 8, 2, 8, 3, 5]), 4)
    expected, found, sent = (
        torch.zeros(target.shape, dtype=torch.uint8),
        *(it.view(torch.uint8) for it in (target, source)),
    )
    expected[0], expected[8, ..., 3:5, :] = sent[6], sent[2, ..., 3:5, :]
    assert torch.equal(found, expected)
