"""Each kernel against its ceiling: the streaming bandwidth or the GEMM rate measured in the same run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from lib.arguments import new_parser
from lib.ceilings import gemm_rate, median_ms
from lib.report import report
from lib.streaming import streaming_bandwidth
from lib.tensors import decode_problem, random_normal
from nanovllm.engine.scheduling.step import MAX_CHUNKS
from nanovllm.kernels import ExpertWeights, triton_experts
from nanovllm.kernels.triton_attention import Backend
from nanovllm.kernels.triton_fp8 import quantize_tokens
from nanovllm.layers.attention import PagedAttention
from nanovllm.utils.fp8 import E4M3, Fp8Format, ScaledTokens, ScaledWeight


@dataclass
class Measured:
    """A kernel's time, the bytes it must move or the FLOPs it must do, and the time of the same in bfloat16."""

    name: str
    us: float
    bytes: float = 0.0
    flops: float = 0.0
    bf16_us: float | None = None


def time_us(*calls: Callable[[], object]) -> float:
    """Median GPU time of a call in a graph; several calls, over other data each, keep the caches from helping."""
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_ms(graph.replay) * 1e3 / len(calls)


def measure_decode(backend: Backend, block_size: int) -> Iterator[Measured]:
    rng = random.Random(0)
    ragged: list[int] = []
    while sum(ragged) < 512 * 512:
        ragged.append(min(int(16 * 512 ** rng.random()), 512 * 512 - sum(ragged)))
    problems = {"512 x 512": [512] * 512, "ragged 16-8192": ragged, "1 x 8192": [8192], "1 x 512": [512]}
    for name, lengths in problems.items():
        for num_heads in (32, 16):
            # Enough of them that the time in which a graph starts does not count, and that no cache holds them all.
            num_copies = 4 if sum(lengths) > 10**5 else 16
            calls = []
            for _ in range(num_copies):
                query, pool, metadata = decode_problem(lengths, num_heads, 8, block_size)
                split = backend.split_work(metadata, num_heads, pool)  # made once per step
                metadata = replace(metadata, work_split=split)
                calls.append(partial(backend.attend, query, pool, metadata, 0.09))
            moved = sum(lengths) * 2 * 8 * 128 * 2
            yield Measured(f"decode attention, {name}, GQA {num_heads // 8}", time_us(*calls), bytes=moved)


def measure_prefill(backend: Backend, block_size: int) -> Iterator[Measured]:
    for num_heads, prompts in ((32, [2048]), (32, [8192]), (32, [32768]), (32, [1024] * 8), (16, [8192])):
        _, pool, decode = decode_problem(prompts, num_heads, 8, block_size)
        lengths = torch.tensor(prompts, dtype=torch.int32)
        starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).cuda()
        slots = torch.zeros(sum(prompts), dtype=torch.int64, device="cuda")
        metadata = replace(decode, query_starts=starts, max_query_len=max(prompts), slot_mapping=slots)
        metadata = replace(metadata, work_split=backend.split_work(metadata, num_heads, pool))
        query = random_normal(sum(prompts), num_heads, 128)
        flops = sum(4 * num_heads * 128 * length**2 / 2 for length in prompts)
        name = f"prefill attention, {len(prompts)} x {prompts[0]}, GQA {num_heads // 8}"
        yield Measured(name, time_us(partial(backend.attend, query, pool, metadata, 0.09)), flops=flops)


def measure_chunks(backend: Backend, block_size: int) -> Iterator[Measured]:
    """Chunks behind what is computed of their prompt, as mixed steps have them: one prompt's, with room for 32."""
    context = 8192
    for num_heads, num_tokens in itertools.product((32, 16), (64, 128, 256, 320, 512, 1024)):
        _, pool, decode = decode_problem([context], num_heads, 8, block_size)
        empty = torch.zeros(31, dtype=torch.int32, device="cuda")
        ends = torch.full((32,), num_tokens, dtype=torch.int32, device="cuda")
        metadata = replace(
            decode,
            block_tables=torch.nn.functional.pad(decode.block_tables, (0, 0, 0, 31)),
            context_lens=torch.cat((decode.context_lens, empty)),
            query_starts=torch.cat((empty[:1], ends)),
            max_query_len=num_tokens,
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device="cuda"),
        )
        metadata = replace(metadata, work_split=backend.split_work(metadata, num_heads, pool))
        query = random_normal(num_tokens, num_heads, 128)
        flops = 4 * num_heads * 128 * num_tokens * (context - num_tokens / 2)
        name = f"attention of {num_tokens} tokens behind {context - num_tokens}, GQA {num_heads // 8}"
        yield Measured(name, time_us(partial(backend.attend, query, pool, metadata, 0.09)), flops=flops)


def measure_mixed(backend: Backend, block_size: int) -> Iterator[Measured]:
    """A chunk behind a prefix and decode rows beside it, as a layer of a mixed step runs them."""
    size, where = 256, torch.device("cuda")
    attention = PagedAttention(128, 1e-6, None, backend, qk_norm=False, dtype=torch.bfloat16, device=where)
    stream = torch.cuda.Stream(priority=-1)
    for (num_rows, context), start, num_tokens in itertools.product(
        ((1, 6144), (4, 4096), (32, 1024)), (512, 2048, 4096, 7168), (124, 172, 224)
    ):
        calls = []
        for _ in range(8):
            lengths = [context] * num_rows + [start + num_tokens]
            _, pool, decode = decode_problem(lengths, 32, 8, block_size)
            places = torch.arange(size, device=where)
            rows = replace(
                decode,
                block_tables=decode.block_tables[places.clamp(max=num_rows)],
                context_lens=torch.where(places < num_rows, context, 0).int(),
                query_starts=torch.arange(size + 1, dtype=torch.int32, device=where),
            )
            metadata = replace(
                decode,
                slot_mapping=torch.zeros(size, dtype=torch.int64, device=where),
                block_tables=decode.block_tables[num_rows:].expand(MAX_CHUNKS, -1).contiguous(),
                context_lens=torch.where(places[:MAX_CHUNKS] < 1, start + num_tokens, 0).int(),
                query_starts=torch.where(places[: MAX_CHUNKS + 1] < 1, num_rows, num_rows + num_tokens).int(),
                max_query_len=num_tokens,
                decode=replace(rows, work_split=backend.split_work(rows, 32, pool)),
                decode_stream=stream,
            )
            metadata = replace(metadata, work_split=backend.split_work(metadata, 32, pool))
            calls.append(partial(attention.attend, random_normal(size, 32, 128), pool, metadata))
        moved = (num_rows * context + start + num_tokens) * 2 * 8 * 128 * 2
        flops = 4 * 32 * 128 * num_tokens * (start + num_tokens / 2)
        name = f"{num_tokens} tokens behind {start}, {num_rows} x {context} beside"
        yield Measured(name, time_us(*calls), bytes=moved, flops=flops)


def measure_rest(backend: Backend, block_size: int) -> Iterator[Measured]:
    num_tokens, size, ffn, vocab_size = 8192, 4096, 12288, 151936
    x, residual, weight = random_normal(num_tokens, size), random_normal(num_tokens, size), random_normal(size)
    yield Measured(
        f"residual and norm, {num_tokens} x {size}",
        time_us(lambda: backend.add_rms_norm(x, residual, weight, 1e-6)),
        bytes=4 * x.nbytes,
    )
    gate_up = random_normal(num_tokens, 2 * ffn)
    yield Measured(
        f"gate, {num_tokens} x {ffn}", time_us(lambda: backend.silu_and_mul(gate_up)), bytes=1.5 * gate_up.nbytes
    )
    _, pool, metadata = decode_problem([num_tokens], 32, 8, block_size)
    slots = (metadata.block_tables[0].long()[:, None] * block_size + torch.arange(block_size, device="cuda")).flatten()
    qkv, angles = random_normal(num_tokens, 48 * 128), torch.rand(num_tokens, 64, device="cuda")
    positions = torch.arange(num_tokens, device="cuda")
    head_weights, tables = (random_normal(128), random_normal(128)), (angles.cos(), angles.sin())
    yield Measured(
        f"QK-norm, rotary and KV store, {num_tokens} tokens",
        time_us(lambda: backend.norm_rotate_store(qkv, *head_weights, 1e-6, positions, *tables, pool, slots)),
        bytes=2 * qkv.nbytes + angles.nbytes * 2,
    )
    logits = random_normal(256, vocab_size)
    temperatures = torch.full((256,), 0.6, device="cuda")
    seeds, indices = torch.arange(256, device="cuda"), torch.zeros(256, dtype=torch.int64, device="cuda")
    yield Measured(
        f"sampler, 256 x {vocab_size}",
        time_us(lambda: backend.sample_tokens(logits, temperatures, seeds, indices)),
        bytes=logits.nbytes,
    )
    for num_outputs, num_inputs in ((6144, 1024), (24576, 4096)):
        one = random_normal(1, num_inputs)
        weights = [random_normal(num_outputs, num_inputs) for _ in range(2**29 // (num_outputs * num_inputs * 2))]
        calls = [partial(backend.linear, one, matrix, None) for matrix in weights]
        yield Measured(f"linear of one token, {num_outputs} x {num_inputs}", time_us(*calls), bytes=weights[0].nbytes)


def measure_fp8(backend: Backend, block_size: int) -> Iterator[Measured]:
    """The linear layers of an 8B model with FP8 weights: the GEMM alone, of inputs that are quantized, and with that.

    GEMMs of many tokens are held against the bfloat16 rate.
    """
    device = torch.device("cuda")
    for num_outputs, num_inputs in ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)):
        num_copies = 2**29 // (num_outputs * num_inputs)
        wide = [random_normal(num_outputs, num_inputs) * 0.02 for _ in range(num_copies)]
        by_form = {"rows": Fp8Format(), "blocks": Fp8Format(128)}
        weights: dict[str, list[ScaledWeight]] = {form: [] for form in by_form}
        for (form, it), matrix in itertools.product(by_form.items(), wide):
            weights[form].append(it.empty_weight([num_outputs], num_inputs, device))
            weights[form][-1].quantize(matrix)
        for num_tokens in (1, 8, 16, 64, 256, 2048):
            x = random_normal(num_tokens, num_inputs)
            bf16_us = time_us(*(partial(backend.linear, x, matrix, None) for matrix in wide))
            flops = 2 * num_tokens * num_outputs * num_inputs if num_tokens >= 256 else 0
            for form, matrices in weights.items():
                moved = 0 if flops else matrices[0].values.nbytes + matrices[0].scales.nbytes
                tokens = quantize_tokens(x, matrices[0])
                shape = f"{num_tokens} tokens, {num_outputs} x {num_inputs}, {form}"
                for name, inputs in (("FP8 GEMM", tokens), ("FP8 linear", x)):
                    us = time_us(*(partial(backend.linear, inputs, matrix, None) for matrix in matrices))
                    yield Measured(f"{name}, {shape}", us, moved, flops, bf16_us)


def measure_experts(backend: Backend, block_size: int) -> Iterator[Measured]:
    """The experts of a layer of Qwen3-30B-A3B, from norm to sum, and their two GEMMs alone.

    Counted are the weights of the experts that the tokens do pass.
    """
    count, top_k, size, between, device = 128, 8, 2048, 768, torch.device("cuda")
    norm = torch.ones(size, dtype=torch.bfloat16, device="cuda"), 1e-6
    for form, it in {"bf16": None, "rows": Fp8Format(), "blocks": Fp8Format(128)}.items():
        layers = [_random_experts(it, count, top_k, size, between, device) for _ in range(2)]
        for num_tokens in (1, 4, 16, 64, 256, 2048, 8192):
            steps = [(random_normal(num_tokens, size), layers[turn % 2]) for turn in range(4)]
            gate_up, down, distinct = [], [], 0
            for x, experts in steps:
                normed, _, tokens, counters = triton_experts.norm_inputs(x, None, norm, experts)
                routing = triton_experts.route(normed, experts, counters, None, 132)
                distinct += int((routing.counts > 0).sum())
                inputs = normed if tokens is None else tokens
                gate_up.append(partial(triton_experts.expert_linear, inputs, experts, routing, is_gated=True))
                gated: torch.Tensor | ScaledTokens = gate_up[-1]()
                if isinstance(experts.down, ScaledWeight):
                    assert isinstance(gated, torch.Tensor)
                    gated = quantize_tokens(gated, experts.down)
                down.append(partial(triton_experts.expert_linear, gated, experts, routing, is_gated=False))
            whole = [partial(backend.norm_experts, x, None, norm, experts) for x, experts in steps]
            elements = distinct / len(steps) * size * between
            for name, calls, parts in (("whole", whole, 3), ("gate and up", gate_up, 2), ("down", down, 1)):
                flops = 2 * num_tokens * top_k * parts * size * between if num_tokens >= 1024 else 0
                moved = 0 if flops else parts * elements * (2 if it is None else 1)
                yield Measured(f"experts, {num_tokens} tokens, {form}, {name}", time_us(*calls), moved, flops)


def _random_experts(
    quantization: Fp8Format | None, count: int, top_k: int, size: int, between: int, device: torch.device
) -> ExpertWeights:
    def stacked(rows: int, columns: int) -> torch.Tensor | ScaledWeight:
        wide = random_normal(count * rows, columns) * columns**-0.5
        if quantization is None:
            return wide
        weight = quantization.empty_weight([rows] * count, columns, device)
        for first in range(0, count * rows, rows):
            weight.rows(slice(first, first + rows)).quantize(wide[first : first + rows])
        return weight

    router = random_normal(count, size) * size**-0.5
    return ExpertWeights(router, stacked(2 * between, size), stacked(size, between), top_k, renormalizes=True)


def measure_fp8_kv(backend: Backend, block_size: int) -> Iterator[Measured]:
    """Attention to KV in FP8, and what stores it, beside the same in bfloat16; an 8B model's heads."""
    scales = torch.full((2, 8), 2.0**-5, device="cuda")
    for name, lengths in {"64 x 4096": [4096] * 64, "512 x 512": [512] * 512, "4 x 8192": [8192] * 4}.items():
        both_us = []
        for has_fp8_kv in (False, True):
            calls = []
            for _ in range(4):  # so many that no cache holds them all
                query, pool, metadata = decode_problem(lengths, 32, 8, block_size, has_fp8_kv=has_fp8_kv)
                metadata = replace(metadata, work_split=backend.split_work(metadata, 32, pool))
                of_pool = scales if has_fp8_kv else None
                calls.append(partial(backend.attend, query, pool, metadata, 0.09, None, of_pool))
            both_us.append(time_us(*calls))
        moved = sum(lengths) * 2 * 8 * 128
        yield Measured(f"decode attention on FP8 KV, {name}", both_us[1], bytes=moved, bf16_us=both_us[0])
    for prompts in ([8192], [1024] * 8):
        _, pool, decode = decode_problem(prompts, 32, 8, block_size)
        starts = torch.nn.functional.pad(decode.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        slots = torch.zeros(sum(prompts), dtype=torch.int64, device="cuda")
        metadata = replace(decode, query_starts=starts, max_query_len=max(prompts), slot_mapping=slots)
        query = random_normal(sum(prompts), 32, 128)
        bf16_us, us = (
            time_us(partial(backend.attend, query, it, metadata, 0.09, None, of_pool))
            for it, of_pool in ((pool, None), (pool.to(E4M3), scales))
        )
        flops = sum(4 * 32 * 128 * length**2 / 2 for length in prompts)
        name = f"prefill attention on FP8 KV, {len(prompts)} x {prompts[0]}"
        yield Measured(name, us, flops=flops, bf16_us=bf16_us)
    num_tokens = 8192
    _, pool, metadata = decode_problem([num_tokens], 32, 8, block_size)
    slots = (metadata.block_tables[0].long()[:, None] * block_size + torch.arange(block_size, device="cuda")).flatten()
    qkv, angles = random_normal(num_tokens, 48 * 128), torch.rand(num_tokens, 64, device="cuda")
    rest = (torch.arange(num_tokens, device="cuda"), angles.cos(), angles.sin())
    heads = (qkv, random_normal(128), random_normal(128), 1e-6, *rest)
    bf16_us, us = (
        time_us(partial(backend.norm_rotate_store, *heads, it, slots, of_pool))
        for it, of_pool in ((pool, None), (pool.to(E4M3), scales))
    )
    moved = 2 * qkv.nbytes - num_tokens * 16 * 128 + angles.nbytes * 2
    yield Measured(f"QK-norm, rotary and store of FP8 KV, {num_tokens}", us, bytes=moved, bf16_us=bf16_us)


SECTIONS = {
    "decode": measure_decode,
    "prefill": measure_prefill,
    "chunks": measure_chunks,
    "mixed": measure_mixed,
    "rest": measure_rest,
    "fp8": measure_fp8,
    "experts": measure_experts,
    "fp8_kv": measure_fp8_kv,
}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--sections", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    args = parser.parse_args()
    torch.manual_seed(0)
    backend, bandwidth, rate = Backend(), streaming_bandwidth(), gemm_rate()
    print(f"streaming bandwidth {bandwidth / 1e12:.2f} TB/s, GEMM rate {rate / 1e12:.0f} TFLOP/s")
    print(f"{'':<48}{'us':>10}{'TB/s':>8}{'TFLOP/s':>9}{'ceiling':>9}{'of bf16':>9}")
    rows = []
    for section in args.sections:
        for kernel in SECTIONS[section](backend, args.block_size):
            bytes_per_s, flop_per_s = kernel.bytes / kernel.us * 1e6, kernel.flops / kernel.us * 1e6
            share = max(bytes_per_s / bandwidth, flop_per_s / rate)
            reached = f"{bytes_per_s / 1e12:8.2f}{'':9}" if kernel.bytes else f"{'':8}{flop_per_s / 1e12:9.0f}"
            of_bf16 = "" if kernel.bf16_us is None else f"{kernel.us / kernel.bf16_us:9.2f}"
            print(f"{kernel.name:<48}{kernel.us:10.1f}{reached}{share:9.0%}{of_bf16}")
            rows.append({**asdict(kernel), "bytes_per_s": bytes_per_s, "flop_per_s": flop_per_s, "share": share})
    report("kernels", {"bandwidth_bytes_per_s": bandwidth, "gemm_flop_per_s": rate, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
