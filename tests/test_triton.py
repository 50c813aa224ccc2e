"""What a machine without a GPU can prove of the Triton kernels: that they are right, and that they compile."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import BackendUnavailableError
from nanovllm.kernels import (
    BackendRequirements,
    cuda_all_reduce,
    cuda_gemm,
    cuda_layer_flags,
    cuda_prefill_attention,
    resolve_backend,
    unsupported_reasons,
)
from nanovllm.utils import nvrtc
from tests.kernel_cases import make_case

triton = pytest.importorskip("triton")
SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.timeout(1800)  # on a slow machine each takes four minutes
@pytest.mark.parametrize("kernels", ["fp8 or experts or one_token", "not (fp8 or experts or one_token)"])
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter_equal_the_reference(which, kernels):
    """In a process of their own: the interpreter replaces the compiler when a kernel is defined."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_alone, "-m", which, "-k", kernels, "tests/interpreted_kernels.py"]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


FLOAT_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
POINTER_TYPES = {**FLOAT_TYPES, "words": "*i32"}
STORE = {"NUM_HEADS": 32, "PADDED_HEADS": 32, "NUM_KV_HEADS": 8, "PADDED_KV_HEADS": 8, "BLOCK_SIZE": 64, "KV_TILE": 64}
NINE_HEADS = {"NUM_HEADS": 9, "PADDED_HEADS": 16, "NUM_KV_HEADS": 3, "PADDED_KV_HEADS": 4}
LIMITS = {"SCALE_OF_ONE": 1 / 448, "MIN_SCALE": 1e-30}
NO_NORM = {"query_weight": None, "key_weight": None}
NO_ROPE = {"cos": None, "sin": None}
PREFILL = {
    "NUM_HEADS": 32,
    "NUM_KV_HEADS": 8,
    "PADDED_REQUESTS": 64,
    "BLOCK_SIZE": 64,
    "TILE_M": 64,
    "KEYS": 64,
    "HAS_PIECES": True,
    "HAS_SPLIT": True,
}
DECODE = {"NUM_KV_HEADS": 8, "GROUP": 4, "PADDED_GROUP": 8, "PADDED_REQUESTS": 512, "BLOCK_SIZE": 64, "TILE": 16}


# A compilation takes seconds, so that what does not work together is not multiplied: float16 comes with heads of 64.
HEADS_OF_TYPES = (("float16", 64), ("bfloat16", 128), ("float32", 128))


def attention_cases(capability: int):
    for dtype, head_dim in HEADS_OF_TYPES:
        wide = dtype == "float32"
        has_tma = capability >= 90 and not wide
        tiles = {"TILE_N": 16 if wide else 64, "STAGES": 1 if wide else 3, "HEAD_DIM": head_dim, "kv_scales": None}
        whole = {"HAS_PIECES": False, "partial": None, "log_sums": None}
        nine_heads = {"NUM_HEADS": 9, "NUM_KV_HEADS": 3}
        by_pointers = [{}] if has_tma else [whole, {}, nine_heads]
        for use_tma, kinds in ((False, by_pointers), (True, [whole, {}, nine_heads] if has_tma else [])):
            for changes in kinds:
                constants = {**PREFILL, **changes, **tiles, "USE_TMA": use_tma}
                yield "_prefill_kernel", dtype, constants, {"num_warps": 8 if wide else 4}
        stages = {"STAGES": 2 if wide else 3, "COMBINED": 4, "HAS_SPLIT": True, "IS_CUDA": True}
        for use_tma, heads in itertools.product((False, True)[: 1 + has_tma], ({}, {"NUM_KV_HEADS": 3, "GROUP": 3})):
            constants = {**DECODE, **heads, **stages, "USE_TMA": use_tma, "HEAD_DIM": head_dim, "kv_scales": None}
            yield "_decode_kernel", dtype, constants, {"num_warps": 4 if wide else 1}
        yield "_decode_kernel", dtype, {**constants, "TILE": 32, "COMBINED": 8}, {"num_warps": 4 if wide else 1}
        for changes in ({}, NO_NORM, NO_ROPE, {**NO_NORM, **NO_ROPE}, NINE_HEADS):
            constants = {**STORE, "HEAD_DIM": head_dim, **changes, "kv_scales": None}
            yield "_norm_rotate_store_kernel", dtype, constants, {}
        if capability >= 89:
            yield from fp8_kv_cases(dtype, head_dim, has_tma=has_tma)


def other_cases(capability: int):
    chunks = {"CHUNK_TILES": 32, "PROGRAMS_PER_SM": 2, "MAX_PROGRAMS_PER_SM": 16, "PADDED_REQUESTS": 512}
    yield "_share_out_kernel", "words", {"TILE": 32, "ends": None, "NUM_KV_HEADS": 8, **chunks}, {}
    yield "_share_out_kernel", "words", {"TILE": 64, "NUM_KV_HEADS": None, **chunks}, {}
    pieces = {"LEAST": 8, "MAX_SPLITS": 16, "PROGRAMS_PER_SM": 2, "PADDED_REQUESTS": 64, "PADDED_TILES": 64}
    for beside_rows in ({}, {"context_of_rows": None}):
        heads = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, **beside_rows}
        yield "_plan_pieces_kernel", "words", {**heads, "TILE_M": 64, "TILE_N": 64, **pieces}, {}
    for dtype in FLOAT_TYPES:
        for gated, has_bias in ((False, True), (True, False), (True, True)):
            tiles = {"TILE_N": 2 if gated else 4, "TILE_K": 1024, "PADDED_INPUTS": 4096}
            has = {"HAS_NORM": True, "HAS_RESIDUAL": True, "HAS_BIAS": has_bias, "IS_GATED": gated}
            yield "_vector_linear_kernel", dtype, {**tiles, **has}, {}
        yield "_add_rms_norm_kernel", dtype, {"HAS_RESIDUAL": True, "PADDED_SIZE": 4096}, {"num_warps": 8}
        yield "_silu_and_mul_kernel", dtype, {"TILE": 1024}, {}
        yield "_best_of_tile_kernel", dtype, {"TILE": 4096, "IS_CUDA": True}, {}
    yield "_stamp_kernel", "words", {}, {"num_warps": 1}
    yield "_best_of_tiles_kernel", "float32", {"NO_TOKEN": -1, "PADDED_TILES": 64}, {"num_warps": 1}
    yield (
        "_gather_rows_kernel",
        "words",
        {"NUM_FIELDS": 4, "POSITION": 1, "BLOCK_SIZE": 64, "TILE": 128},
        {"num_warps": 1},
    )
    yield "_advance_rows_kernel", "words", {"LAST_TOKEN": 0, "POSITION": 1, "OUTPUT_INDEX": 3, "TILE": 128}, {}
    yield from fp8_cases(capability)
    yield from expert_cases(capability)
    yield "_push_kernel", "words", {"PIECE": 4096, "ROW_WORDS": 64, "BLOCK_SIZE": 64}, {"num_warps": 8}


def fp8_kv_cases(dtype: str, head_dim: int, *, has_tma: bool):
    """Attention to a pool in FP8, and what stores there."""
    from nanovllm.kernels import triton_attention

    wide = dtype == "float32"
    whole = {"HAS_PIECES": False, "partial": None, "log_sums": None}
    for use_tma in (False, True)[: 1 + has_tma]:
        common = {"HEAD_DIM": head_dim, "USE_TMA": use_tma}
        for changes in ({}, whole) if use_tma or not has_tma else ({},):
            tiles = {"TILE_N": 16 if wide else 64, "STAGES": 1 if wide else 3}
            yield "_prefill_kernel", dtype, {**PREFILL, **changes, **tiles, **common}, {"num_warps": 8 if wide else 4}
        for tile in (triton_attention.FP8_DECODE_TILE, triton_attention.FP8_FEW_REQUESTS_TILE):
            stages = {"STAGES": 2 if wide else triton_attention.DECODE_STAGES, "HAS_SPLIT": True}
            stages["COMBINED"] = 4 if tile == triton_attention.FP8_DECODE_TILE else 8
            constants = {**DECODE, **stages, **common, "TILE": tile, "IS_CUDA": True}
            yield "_decode_kernel", dtype, constants, {"num_warps": 4 if wide else 1}
    yield "_norm_rotate_store_kernel", dtype, {**STORE, "HEAD_DIM": head_dim}, {}


def fp8_cases(capability: int):
    """Every kind of tile, over the layers of an 8B model; GPUs before sm_89 have no FP8."""
    from nanovllm.kernels import triton_fp8

    if capability < 89:
        return
    for block, num_tokens in itertools.product((None, 128), (1, 17, 33, 2048)):
        for dtype, num_outputs in (("bfloat16", 4096), ("float32", 24576)):
            planned = triton_fp8.plan(num_tokens, num_outputs, 4096, 132, block)
            tiles = {"TILE_N": planned.tile_n, "TILE_T": planned.tile_t, "TILE_K": planned.tile_k}
            constants = {"BLOCK": block, "IS_SPLIT": planned.splits > 1, "STAGES": planned.stages, **tiles}
            constants["FETCHED"] = triton_fp8.FETCHED
            for changes in ({"HAS_BIAS": False, "IS_EVEN": True}, {"HAS_BIAS": True, "IS_EVEN": False}):
                options = {"num_warps": planned.num_warps}
                yield "_scaled_linear_kernel", dtype, {**constants, **changes}, options
    limits = {"NUM_COUNTERS": triton_fp8.NUM_COUNTERS, **LIMITS, "PADDED_SIZE": 4096, "normed": None}
    gated = {"IS_GATED": True, "norm_weight": None, "residual": None}
    for dtype, group in itertools.product(FLOAT_TYPES, (4096, 128)):
        for changes in ({"IS_GATED": False}, {"IS_GATED": False, "residual": None}, gated):
            yield "_prepare_kernel", dtype, {"GROUP": group, **limits, **changes}, {"num_warps": 8}
    sizes = {"PADDED_INPUTS": 4096, "TILE_LINES": 128, "STAGES": 3, "NUM_EXPERTS": 1, "PADDED_EXPERTS": 1}
    for dtype, block, tile, is_gated in (("bfloat16", None, 4, False), ("float32", 128, 2, True)):
        tiles = {"BLOCK": block, "GROUP": block or 4096, "TILE_N": tile, "IS_GATED": is_gated, "NUM_WARPS": 4}
        absent = {"logits": None, "bias": None} if is_gated else {"logits": None, "norm_weight": None, "residual": None}
        constants = {**sizes, **tiles, **absent, **LIMITS}
        yield "_vector_kernel", dtype, constants, {"num_warps": 4}


def expert_cases(capability: int):
    """Every kind of tile, over the layers of Qwen3-30B-A3B, and experts of odd numbers and sizes."""
    from nanovllm.kernels import triton_experts, triton_fp8

    for dtype in FLOAT_TYPES:
        for top_k, padded_top_k, count, padded in ((8, 8, 128, 128), (3, 4, 5, 16))[: 1 + (dtype == "bfloat16")]:
            tile_k = 32 if dtype == "float32" else 128
            for tile_t, is_split in ((16, True), (16, False), (16 if dtype == "float32" else 64, False)):
                experts = {"NUM_EXPERTS": count, "PADDED_EXPERTS": padded, "TOP_K": top_k, "PADDED_TOP_K": padded_top_k}
                tiles = {"TILE_T": tile_t, "TILE_K": tile_k, "IS_SPLIT": is_split, "RENORMALIZES": True}
                slots = {} if is_split else {"slots": None}
                yield "_route_kernel", dtype, {**experts, **tiles, **slots}, {"num_warps": 4}
        yield "_weighted_sum_kernel", dtype, {"TOP_K": 8, "TILE": 1024}, {}
        norm = {"IS_GATED": False, "PADDED_SIZE": 2048, "NUM_COUNTERS": 256, **LIMITS}
        yield "_prepare_kernel", dtype, {**norm, "GROUP": 2048, "values": None, "scales": None}, {"num_warps": 4}
        if capability >= 89:
            for group in (2048, 128):
                yield "_prepare_kernel", dtype, {**norm, "GROUP": group}, {"num_warps": 4}
    for dtype in ("bfloat16", "float32"):
        yield from one_token_cases(capability, dtype)
    formats = [("bfloat16", 2, None), ("float32", 4, None)]
    formats += [("bfloat16", 1, None), ("bfloat16", 1, 128), ("float32", 1, None)] if capability >= 89 else []
    sizes = (1, 64, 256, 512, 4096)
    kinds = [
        (*kind, num_tokens, is_gated)
        for (place, kind), (number, num_tokens) in itertools.product(enumerate(formats), enumerate(sizes))
        for is_gated in (
            (True, False) if kind in (("bfloat16", 2, None), ("bfloat16", 1, 128)) else ((place + number) % 2 == 0,)
        )
    ]
    for dtype, itemsize, block, num_tokens, is_gated in kinds:
        planned = triton_experts.plan(num_tokens, 8, 128, is_gated=is_gated, itemsize=itemsize, block=block)
        tiles = {"TILE_N": planned.tile_n, "TILE_T": planned.tile_t, "TILE_K": planned.tile_k, "STAGES": planned.stages}
        constants = {"IS_GATED": is_gated, "TOP_K": 8, "BLOCK": block, "PADDED_EXPERTS": 128, "IS_EVEN": True, **tiles}
        constants["FETCHED"] = triton_fp8.FETCHED
        unscaled = {} if itemsize == 1 else {"x_scales": None, "w_scales": None}
        yield "_expert_linear_kernel", dtype, {**constants, **unscaled}, {"num_warps": planned.num_warps}


def one_token_cases(capability: int, dtype: str):
    """A token's experts, with weights in its own type and in FP8."""
    router = {"HAS_RESIDUAL": True, "PADDED_INPUTS": 2048}
    yield "_router_kernel", dtype, router, {"num_warps": 4}
    experts = {"NUM_EXPERTS": 128, "PADDED_EXPERTS": 128, "STAGES": 3, **LIMITS}
    absent = {"norm_weight": None, "residual": None, "bias": None}
    for block, scales in ((None, {"w_scales": None}), *(((None, {}), (128, {})) if capability >= 89 else ())):
        gate = {"PADDED_INPUTS": 2048, "TILE_N": 2, "TILE_LINES": 64, "IS_GATED": True, "NUM_WARPS": 4}
        formats = {"BLOCK": block, "GROUP": block or 2048, **scales}
        yield "_vector_kernel", dtype, {**experts, **gate, **formats, **absent}, {"num_warps": 4}
        itemsize = {"float32": 4}.get(dtype, 2) if "w_scales" in scales else 1
        for padded_inputs in (max(32, block or 1), 1024):  # less than a line, and several
            down = {"PADDED_INPUTS": padded_inputs, "TILE_N": 1, "TOP_K": 8, "PADDED_TOP_K": 8, "NUM_WARPS": 8}
            down["ROW_LINES"] = triton.cdiv(padded_inputs * itemsize, 128)
            formats = {"BLOCK": block, "GROUP": block or padded_inputs, "RENORMALIZES": True, **scales}
            yield "_sum_of_experts_kernel", dtype, {**experts, **down, **formats}, {"num_warps": 8}


def test_programs_of_a_gemm_of_few_tokens_run_at_once():
    """In one wave, whatever the layer of an 8B model, and enough of them for all SMs; on a part of these, too."""
    from nanovllm.kernels import triton_fp8

    for num_sms, block, num_tokens in itertools.product((132, 48), (None, 128), (1, 16, 32, 64)):
        for num_outputs, num_inputs in ((6144, 4096), (4096, 4096), (4096, 12288)):
            planned = triton_fp8.plan(num_tokens, num_outputs, num_inputs, num_sms, block)
            num_programs = -(-num_outputs // planned.tile_n) * planned.splits
            assert 0.9 * num_sms <= num_programs <= triton_fp8.MOST_PER_SM * num_sms
            partial_bytes = 2 * 4 * planned.splits * planned.tile_t * num_outputs
            assert planned.splits == 1 or partial_bytes <= num_outputs * num_inputs


INTEGER_POINTERS = {
    "stamps": "*i64",
    "slot_mapping": "*i64",
    "positions": "*i64",
    "seeds": "*i64",
    "output_indices": "*i64",
    "token_ids": "*i64",
    "blocks": "*i64",
    "places": "*i32",
    "block_tables": "*i32",
    "context_lens": "*i32",
    "query_starts": "*i32",
    "plan": "*i32",
    "context_of_rows": "*i32",
    "chunk_starts": "*i32",
    "slots": "*i64",
    "numbers": "*i64",
    "row_numbers": "*i64",
    "counters": "*i32",
    "counts": "*i32",
    "table": "*i32",
    "chosen": "*i32",
}
COUNTS = {"num_inputs", "num_outputs", "words", "size", "num_tokens", "num_tiles"}
INTEGERS = {
    "place",
    "num_requests",
    "num_counters",
    "splits",
    "most_pieces",
    "most_parts",
    "num_sms",
    "num_rows",
    "num_stored",
    "max_blocks",
    "padding_row",
    "padding_slot",
    "first_token",
}
FLOAT_POINTERS = {
    "partial",
    "log_sums",
    "cos",
    "sin",
    "best",
    "scores",
    "temperatures",
    "row_temperatures",
    "scales",
    "kv_scales",
    "x_scales",
    "w_scales",
    "weights",
}


def argument_type(kernel: str, name: str, dtype: str, *, has_fp8_kv: bool) -> str:
    if has_fp8_kv and name == "kv_cache":
        return "*i16" if kernel == "_decode_kernel" else "*fp8e4nv"
    if (kernel, name) in {
        ("_scaled_linear_kernel", "x"),
        ("_scaled_linear_kernel", "weight"),
        ("_prepare_kernel", "values"),
    }:
        return "*fp8e4nv"
    if name == "slots" and kernel in ("_route_kernel", "_sum_of_experts_kernel"):
        return "*i64"
    if name == "logits" and kernel in ("_router_kernel", "_vector_kernel", "_sum_of_experts_kernel"):
        return "*fp32"
    if name in INTEGER_POINTERS:
        return INTEGER_POINTERS[name]
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name in ("scale_log2", "eps"):
        return "fp32"
    if name in INTEGERS:
        return "i32"
    return "i64" if name.endswith("_stride") or name in COUNTS else POINTER_TYPES[dtype]


@pytest.mark.timeout(1800)  # a minute or two where triton has not kept what it compiled before
@pytest.mark.parametrize("cases", [attention_cases, other_cases])
@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_kernels_compile_without_a_gpu(capability, cases):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanovllm.kernels import (
        triton_attention,
        triton_experts,
        triton_fp8,
        triton_fused,
        triton_one_token,
        triton_rows,
        triton_stamps,
        triton_transfer,
    )

    modules = (
        triton_attention,
        triton_experts,
        triton_fp8,
        triton_fused,
        triton_one_token,
        triton_rows,
        triton_stamps,
        triton_transfer,
    )
    kernels = {name: kernel for module in modules for name, kernel in vars(module).items()}
    compiled_kinds = set()
    for name, dtype, constants, options in cases(capability):
        kind = (name, dtype, constants.get("USE_TMA"), constants.get("BLOCK"), "kv_scales" in constants)
        if capability != 90 and kind in compiled_kinds:
            continue  # all tiles and all that is optional are compiled for sm_90
        compiled_kinds.add(kind)
        kernel = kernels[name]
        signature = {
            argument: "constexpr"
            if argument in constants
            else argument_type(name, argument, dtype, has_fp8_kv="kv_scales" not in constants)
            for argument in kernel.arg_names
        }
        if name in ("_vector_kernel", "_sum_of_experts_kernel") and "w_scales" not in constants:
            signature["weight"] = "*fp8e4nv"
        if name == "_expert_linear_kernel" and "w_scales" not in constants:
            signature |= {"x": "*fp8e4nv", "weight": "*fp8e4nv"}
        if "OVERLAPS" in kernel.arg_names:
            constants = {**constants, "OVERLAPS": capability >= 90}
            options = {**options, "launch_pdl": capability >= 90}
            signature["OVERLAPS"] = "constexpr"
        if constants.get("USE_TMA"):
            rows, row_type = constants.get("TILE_N") or constants["TILE"], signature["kv_cache"][1:]
            width = constants["HEAD_DIM"] // (2 if row_type == "i16" else 1)
            signature["kv_rows"] = f"tensordesc<{row_type}[{rows},{width}]>"
        # As launches find them: else bytes would be loaded one by one.
        aligned = [place for place, kind in enumerate(signature.values()) if kind == "*fp8e4nv"]
        if name in ("_vector_kernel", "_sum_of_experts_kernel", "_router_kernel"):
            weights = "router" if name == "_router_kernel" else "weight"
            aligned += [kernel.arg_names.index(argument) for argument in ("x", weights, "num_inputs")]
        if name in ("_scaled_linear_kernel", "_expert_linear_kernel", "_route_kernel"):
            aligned += [kernel.arg_names.index(argument) for argument in ("x", "num_inputs")]
        if name in ("_expert_linear_kernel", "_route_kernel"):
            aligned += [kernel.arg_names.index("weight" if "weight" in kernel.arg_names else "router")]
        attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[capability], f"{name} {dtype} {constants}"


TILES = [(256, 4, True), (192, 4, False), (176, 2, False), (96, 1, True)]


def compile_or_skip(compiled, *arguments):
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        code = compiled(*arguments)
    except BackendUnavailableError as error:
        if "needs NVRTC" in str(error):
            pytest.skip(str(error))
        raise
    assert code[1:4] == b"ELF"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_flags_of_layers_compile_without_a_gpu(architecture):
    compile_or_skip(cuda_layer_flags.compiled, 36, architecture)


@pytest.mark.parametrize("dtype", cuda_all_reduce.KINDS, ids=str)
@pytest.mark.parametrize("size", [2, 8])
def test_sums_over_ranks_compile_without_a_gpu(size, dtype):
    compile_or_skip(cuda_all_reduce._compiled, size, size - 1, dtype, "sm_90")
    compile_or_skip(cuda_all_reduce._compiled, size, 0, dtype, "sm_100")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "cluster", "gated"), TILES)
def test_gemms_of_lanes_compile_without_a_gpu(width, cluster, gated, dtype):
    stages = cuda_gemm.num_stages(width)
    compile_or_skip(cuda_gemm._compiled, width, cluster, stages, gated, dtype)
    # Barriers take two words a stage.
    assert cuda_gemm.OTHER_BYTES + stages * (cuda_gemm._stage_bytes(width) + 16) <= SHARED_MEMORY_BYTES[90]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "block_size"), [(128, 64), (64, 16), (128, 96)])
def test_prefill_attention_compiles_without_a_gpu(head_dim, block_size, dtype):
    compile_or_skip(cuda_prefill_attention._compiled, dtype, head_dim, block_size)
    assert cuda_prefill_attention.shared_bytes(head_dim) + 256 <= SHARED_MEMORY_BYTES[90]  # barriers take up to 256


def test_which_steps_large_tiles_are_for(monkeypatch):
    """A full tile of 128 queries of a head for each SM, of a type that the kernel is for, on Hopper."""
    monkeypatch.setattr(cuda_prefill_attention, "is_hopper", lambda _: True)
    monkeypatch.setattr(cuda_prefill_attention, "_can_load", lambda *_: True)

    def can_serve(num_tokens: int, num_heads: int = 8, dtype: torch.dtype = torch.bfloat16, **options: Any) -> bool:
        num_rows = options.pop("num_rows", 0)
        shape = {"num_heads": num_heads, "num_kv_heads": num_heads // 4, "head_dim": 64, "block_size": 64}
        case = make_case([(num_tokens, num_tokens)], device="cpu", dtype=dtype, **(shape | options))
        metadata = case.metadata
        if num_rows:
            rows = replace(metadata, context_lens=torch.zeros(num_rows, dtype=torch.int32), max_query_len=1)
            metadata = replace(metadata, decode=rows)
        return cuda_prefill_attention.can_serve(metadata, num_heads, case.kv_cache, 8)

    assert can_serve(128)
    assert can_serve(128, dtype=torch.float16)
    assert can_serve(128, head_dim=128)
    assert can_serve(64, num_heads=16)
    assert not can_serve(127)
    assert not can_serve(128, num_heads=4)
    assert not can_serve(128, dtype=torch.float32)
    assert not can_serve(128, has_fp8_kv=True)
    assert not can_serve(128, head_dim=96)
    assert can_serve(200, num_rows=72)
    assert not can_serve(199, num_rows=72), "all rows may be in use"
    monkeypatch.setattr(cuda_prefill_attention, "is_hopper", lambda _: False)
    assert not can_serve(128)


def test_a_driver_that_refuses_the_kernel_leaves_prompts_to_triton(monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise BackendUnavailableError("cuModuleLoadData failed: injected")

    monkeypatch.setattr(cuda_prefill_attention, "_kernels", refuse)
    variant = torch.device("cpu"), torch.bfloat16, 128, 4096  # which no other test asks for: the answer is kept
    assert not cuda_prefill_attention._can_load(*variant)
    assert not cuda_prefill_attention._can_load(*variant)
    assert [record.message for record in caplog.records] == [
        "the attention of prompts runs in Triton: cuModuleLoadData failed: injected"
    ]


def test_what_is_compiled_is_kept_on_disk(monkeypatch, tmp_path, caplog):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" __global__ void nothing() {}'
    compile_or_skip(nvrtc.compile_source, source, "nothing.cu", "sm_90")
    (kept,) = (tmp_path / "nanovllm" / "kernels").iterdir()
    kept.write_bytes(b"as it was kept")
    assert nvrtc.compile_source(source, "nothing.cu", "sm_90") == b"as it was kept"
    compile_or_skip(nvrtc.compile_source, source, "nothing.cu", "sm_80")
    compile_or_skip(nvrtc.compile_source, source + "\n", "nothing.cu", "sm_90")
    assert not caplog.records
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_or_skip(nvrtc.compile_source, source, "nothing.cu", "sm_90")
    assert "compiled kernels cannot be kept" in caplog.text


def test_tiles_are_as_wide_as_makes_whole_turns():
    # 24, 23 and 4 x 24 tiles, where 25 fit at a time.
    assert [cuda_gemm.tile_width(rows, 25, 16) for rows in (6144, 4096, 24576)] == [256, 176, 256]
    # Two turns of narrow tiles instead of one of 23 wide ones and one of a single one.
    assert cuda_gemm.tile_width(6144, 23, 16) == 144
    assert cuda_gemm.tile_width(4096, 23, 32) == 192
    assert cuda_gemm.tile_width(96, 100, 32) == 96


def test_resolve_backend_answers_with_reasons():
    needs = BackendRequirements("cpu", torch.float32, 48)
    assert resolve_backend("auto", needs).backend.name == "torch"
    reasons = unsupported_reasons("triton", needs)
    assert any("CUDA" in reason for reason in reasons)
    assert any("48" in reason for reason in reasons)
    with pytest.raises(BackendUnavailableError, match=r"triton.*CUDA, not on cpu; .*not 48"):
        resolve_backend("triton", needs)
    resolved = resolve_backend("auto", BackendRequirements("cuda", torch.bfloat16, 48))
    assert resolved.backend.name == "torch"
    assert "not triton" in resolved.reason
    assert resolve_backend("auto", BackendRequirements("cuda", torch.bfloat16, 128)).backend.name == "triton"
