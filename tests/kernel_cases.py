"""Random paged-attention problems and their answers by the torch reference in float64-like care (float32)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanovllm.kernels import NUM_ROW_FIELDS, AttentionMetadata, Kernels, RowField, torch_reference
from nanovllm.layers.attention import PagedAttention
from nanovllm.utils.fp8 import E4M3, quantize_by

# (query length, context length) of each request: decode, whole prompts, chunks behind a cached prefix, odd borders.
DECODE = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 700), (1, 63)]
OPTIONAL = [(True, True), (True, False), (False, True), (False, False)]
"""Whether query and key heads are normed, and whether they are rotated."""
PREFILL = [(5, 5), (1, 40), (33, 33), (16, 100), (70, 135), (1, 1)]


@dataclass(frozen=True)
class Case:
    qkv: torch.Tensor
    weights: tuple[torch.Tensor | None, torch.Tensor | None]
    positions: torch.Tensor
    tables: tuple[torch.Tensor | None, torch.Tensor | None]
    pool: torch.Tensor
    metadata: AttentionMetadata
    kv_scales: torch.Tensor | None = None

    @property
    def kv_cache(self) -> torch.Tensor:
        """The middle one of the pool's three layers, the only one that is to be touched."""
        return self.pool[:, 1]

    def store(self, backend: Kernels, kv_cache: torch.Tensor) -> torch.Tensor:
        """The query heads; keys and values go to `kv_cache`."""
        slots = self.metadata.slot_mapping
        heads = self.qkv, *self.weights, 1e-6, self.positions, *self.tables
        return backend.norm_rotate_store(*heads, kv_cache, slots, self.kv_scales)

    def split(self, backend: Kernels, metadata: AttentionMetadata, num_heads: int) -> torch.Tensor | None:
        return backend.split_work(metadata, num_heads, self.kv_cache)

    def expected(self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of `query` to the numbers that are stored in `kv_cache`, in float64."""
        wide = kv_cache.double()
        if self.kv_scales is not None:
            wide = wide * self.kv_scales.double()[:, :, None, None]
        output, starts = torch.empty_like(query, dtype=torch.float64), self.metadata.query_starts.tolist()
        for row, context_len in enumerate(self.metadata.context_lens.tolist()):
            q = query[starts[row] : starts[row + 1]].double().transpose(0, 1)
            context = torch_reference.gather_context(wide, self.metadata.block_tables[row], context_len)
            key, value = (it.repeat_interleave(len(q) // len(it), dim=0) for it in context)
            positions = torch.arange(context_len, device=q.device)
            hidden = positions > positions[context_len - q.shape[1] :, None]
            scores = (q @ key.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
            output[starts[row] : starts[row + 1]] = (scores.softmax(dim=-1) @ value).transpose(0, 1)
        return output


def make_case(
    spans: list[tuple[int, int]],
    *,
    device: str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    seed: int = 0,
    has_norm: bool = True,
    has_rope: bool = True,
    has_fp8_kv: bool = False,
) -> Case:
    """A layer's view of a pool of three layers, whose blocks are given out in random order; unused places are NaN.

    A pool in FP8 has scales that are no powers of two, and other ones for each head.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tile = math.gcd(block_size, 64)
    counts = [-(-context // block_size) for _, context in spans]
    order = torch.randperm(sum(counts) + 3, generator=generator)
    shape = (len(order), 3, 2, num_kv_heads, block_size, head_dim)
    pool = torch.full(shape, float("nan"), dtype=E4M3 if has_fp8_kv else dtype, device=device)
    kv_scales = torch.linspace(0.011, 0.07, 2 * num_kv_heads, device=device).view(2, -1) if has_fp8_kv else None
    # Bytes can be indexed on any device.
    places_of = pool.view(torch.uint8) if has_fp8_kv else pool
    tables = torch.full((len(spans), max(counts)), 10**6, dtype=torch.int32)
    slots, first = [], 0
    for row, ((query_len, context_len), count) in enumerate(zip(spans, counts, strict=True)):
        blocks = order[first : first + count]
        first += count
        tables[row, :count] = blocks
        places = torch.arange(context_len)
        all_slots = blocks[places // block_size] * block_size + places % block_size
        cached = all_slots[: context_len - query_len]
        for side in (0, 1):
            stored = normal(len(cached), num_kv_heads, head_dim)
            if kv_scales is not None:
                stored = quantize_by(stored, kv_scales[side][:, None]).view(torch.uint8)
            places_of[cached // block_size, 1, side, :, cached % block_size] = stored
        # As the step that stored the last of them has left it.
        if len(cached):
            block, place = divmod(int(cached[-1]), block_size)
            places_of[block, 1, 1, :, place + 1 : place - place % tile + tile] = 0
        slots.append(all_slots[context_len - query_len :])
    lengths = torch.tensor([query_len for query_len, _ in spans])
    contexts = torch.tensor([context_len for _, context_len in spans], dtype=torch.int32)
    metadata = AttentionMetadata(
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device),
        context_lens=contexts.to(device),
        query_starts=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device),
        max_query_len=int(lengths.max()),
        max_context_len=int(contexts.max()),
    )
    total = int(lengths.sum())
    qkv = normal(total, (num_heads + 2 * num_kv_heads) * head_dim)
    positions = torch.cat([torch.arange(context - query, context) for query, context in spans]).to(device)
    angles = torch.rand(int(contexts.max()), head_dim // 2, generator=generator).to(device) * 6
    weights = (1 + 0.1 * normal(head_dim), 1 + 0.1 * normal(head_dim))
    tables_of_angles = (angles.cos(), angles.sin()) if has_rope else (None, None)
    weights_of_norms = weights if has_norm else (None, None)
    return Case(qkv, weights_of_norms, positions, tables_of_angles, pool, metadata, kv_scales)


def relative_error(backend: Kernels, case: Case) -> float:
    """Stores and attends with `backend`; ||out - ref|| / ||ref|| against the reference, which stores for itself."""
    expected_cache = case.kv_cache.clone()
    expected_query = case.store(torch_reference.Backend(), expected_cache)
    scale = expected_query.shape[-1] ** -0.5
    query = case.store(backend, case.kv_cache)
    tolerance = 2e-2 if query.element_size() == 2 else 1e-5
    torch.testing.assert_close(query, expected_query, atol=tolerance, rtol=tolerance)
    # Keys are rounded after other orders of summation. Untouched places are NaN in both, but values may be cleared.
    stored, expected_stored = case.kv_cache.float(), expected_cache.float()
    untouched = expected_stored.isnan()
    if case.kv_scales is None:
        torch.testing.assert_close(stored[~untouched], expected_stored[~untouched], atol=tolerance, rtol=tolerance)
        expected = case.expected(expected_query, expected_cache, scale)
    else:
        # Where a last bit rounds a key to another number of e4m3, it is the next one.
        torch.testing.assert_close(stored[~untouched], expected_stored[~untouched], atol=2**-9, rtol=2**-3)
        assert (stored != expected_stored)[~untouched].float().mean() < 0.01
        expected = case.expected(expected_query, case.kv_cache, scale)
    assert stored[:, 0][untouched[:, 0]].isnan().all()
    assert (stored[:, 1][untouched[:, 1]].nan_to_num(0) == 0).all()
    assert case.pool[:, [0, 2]].float().isnan().all(), "writes to other layers"
    output = backend.attend(query, case.kv_cache, case.metadata, scale, None, case.kv_scales).float()
    assert not output.isnan().any(), "reads beyond a request's context"
    return ((output - expected).norm() / expected.norm()).item()


def check_fp8_store(backend: Kernels, *, device: str, dtype: torch.dtype) -> None:
    """Each number as the format has it; what is too large is the largest number, what is not finite is seen."""
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    case = make_case([(7, 7)], device=device, dtype=dtype, has_norm=False, has_rope=False, has_fp8_kv=True, **shape)
    heads = case.qkv.view(7, 8, 64)
    heads[0, 4, :3] = torch.tensor([6e4, -6e4, 0.0])
    heads[1, 6:, 5], heads[2, 5, 0], heads[3, 7, 1] = 6e4, float("inf"), float("nan")
    case.store(backend, case.kv_cache)
    block = int(case.metadata.block_tables[0, 0])
    stored = case.kv_cache[block, :, :, :7].float().permute(2, 0, 1, 3)
    expected = heads[:, 4:].view(7, 2, 2, 64).float() / case.kv_scales[:, :, None]
    is_finite = expected.isfinite()
    assert torch.equal(stored.isnan(), ~is_finite)
    assert int((~is_finite).sum()) == 2
    nearest = expected.clamp(-448, 448).to(E4M3).float()
    assert torch.equal(stored[is_finite], nearest[is_finite])
    assert stored[0, 0, 0, :3].tolist() == [448.0, -448.0, 0.0]
    assert (stored[1, 1, :, 5] == 448.0).all()


def mixed_error(
    backend: Kernels,
    rows: list[int],
    chunks: list[tuple[int, int]],
    num_empty_rows: int,
    *,
    with_split: bool,
    decode_stream: torch.cuda.Stream | None = None,
    **shape: Any,
) -> float:
    """The error of attention in a step with both parts: by two calls, for rows of these contexts, of which the last
    `num_empty_rows` that there is room for have none, and for chunks, against the reference's one call for all."""
    case = make_case([*((1, context) for context in rows), *chunks], **shape)
    head_dim, whole = shape["head_dim"], case.metadata
    num_rows = len(rows) + num_empty_rows
    assert num_rows <= len(case.positions)
    device = torch.device(shape["device"])

    decode = AttentionMetadata(
        slot_mapping=whole.slot_mapping[:num_rows],
        block_tables=torch.nn.functional.pad(whole.block_tables[: len(rows)], (0, 0, 0, num_empty_rows), value=10**6),
        context_lens=torch.nn.functional.pad(whole.context_lens[: len(rows)], (0, num_empty_rows)),
        query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        max_query_len=1,
        max_context_len=whole.max_context_len,
    )
    # As in a step of fixed size: requests without tokens at the end.
    metadata = replace(
        whole,
        block_tables=torch.nn.functional.pad(whole.block_tables[len(rows) :], (0, 0, 0, 2)),
        context_lens=torch.nn.functional.pad(whole.context_lens[len(rows) :], (0, 2)),
        query_starts=torch.nn.functional.pad(
            whole.query_starts[len(rows) :], (0, 2), value=int(whole.query_starts[-1])
        ),
        max_query_len=max(whole.max_query_len, 2),  # chunks of one token are chunks
        decode=decode,
        decode_stream=decode_stream,
    )
    if with_split:
        num_heads = shape["num_heads"]
        decode = replace(decode, work_split=case.split(backend, decode, num_heads))
        metadata = replace(metadata, work_split=case.split(backend, metadata, num_heads), decode=decode)
    # Behind the split, whose kernel must not come right before those of attention.
    query = case.store(backend, case.kv_cache)
    expected = case.expected(query, case.kv_cache, head_dim**-0.5)
    options = {"qk_norm": False, "dtype": shape["dtype"], "device": device, "kv_scales": case.kv_scales}
    attention = PagedAttention(head_dim, 1e-6, None, backend, **options)
    output = attention.attend(query, case.kv_cache, metadata).float()
    assert not output.isnan().any(), "reads beyond a request's context"
    return ((output - expected).norm() / expected.norm()).item()


MIXED = [
    ([64, 1, 700, 33], [(5, 5), (16, 100), (1, 1)], 11),
    ([17], [(70, 135)], 0),
    ([90, 40, 16], [(33, 33)], 20),
]
"""Rows, chunks, and how many rows there is room for besides."""


def check_fused(backend: Kernels, *, device: str, dtype: torch.dtype, size: int) -> None:
    """Norm, gate and sampler of `backend` against the reference."""
    reference = torch_reference.Backend()
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    x, residual, weight, gate_up = normal(5, size), normal(5, size), normal(size), normal(5, 2 * size)
    for other in (None, residual):
        expected = reference.add_rms_norm(x, other, weight, 1e-6)
        torch.testing.assert_close(
            backend.add_rms_norm(x, other, weight, 1e-6), expected, atol=tolerance, rtol=tolerance
        )
    for num_tokens, num_outputs, bias in ((1, 37, None), (1, 64, normal(64)), (1, 5, normal(5)), (2, 64, normal(64))):
        x, weight = normal(num_tokens, size), normal(num_outputs, size)
        expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
        error = (backend.linear(x, weight, bias).double() - expected).norm() / expected.norm()
        assert error < tolerance, f"linear of {num_tokens} tokens: {error}"
    norm = (1 + 0.1 * normal(size), 1e-6)
    for num_tokens, num_outputs in ((1, 37), (1, 64), (3, 64)):
        x, weight, bias = normal(num_tokens, size), normal(2 * num_outputs, size) / size**0.5, normal(2 * num_outputs)
        for other in (None, normal(num_tokens, size)):
            arguments = (x, other, norm, weight)
            for one in (bias, None):
                expected = (*reference.norm_linear(*arguments, one), *reference.norm_gated_linear(*arguments, one))
                actual = (*backend.norm_linear(*arguments, one), *backend.norm_gated_linear(*arguments, one))
                torch.testing.assert_close(actual, expected, atol=2 * tolerance, rtol=2 * tolerance)
    expected_gate = reference.silu_and_mul(gate_up)
    torch.testing.assert_close(backend.silu_and_mul(gate_up), expected_gate, atol=tolerance, rtol=tolerance)
    logits = normal(64, 10 * size + 3)
    temperatures = torch.linspace(0, 3, 64).to(device)
    seeds = torch.randint(2**62, (64,), generator=generator).to(device)
    indices = torch.arange(64, device=device) * 1000
    arguments = (logits, temperatures, seeds, indices)
    # Logits of 16 bits tie at the top now and then, where the noise does not decide; the score must be the same.
    for first_token in (0, 5000):
        chosen, scores = backend.sample_tokens(*arguments, first_token)
        expected_tokens, expected_scores = reference.sample_tokens(*arguments, first_token)
        same = chosen == expected_tokens
        assert same[temperatures > 0].all()
        places = chosen - first_token
        assert torch.equal(logits.gather(1, places[:1, None]).float(), expected_scores[:1, None])
        torch.testing.assert_close(scores, expected_scores)
    bad = {3: float("nan"), 7: float("inf"), 21: float("nan"), 40: float("inf")}
    for row, value in bad.items():
        logits[row, 11 * row] = value
    logits[50], logits[51] = float("-inf"), float("nan")
    for one in (backend, reference):
        chosen, scores = one.sample_tokens(*arguments)
        is_bad = torch.tensor([row in {*bad, 50, 51} for row in range(64)], device=device)
        assert torch.equal(chosen < 0, is_bad)
        assert torch.equal(scores.isfinite(), ~is_bad)


def check_rows(backend: Kernels, *, device: str) -> None:
    """Several steps of a decode batch with padding rows, by `backend` and by the reference."""
    reference, block_size, num_slots = torch_reference.Backend(), 16, 41
    generator = torch.Generator().manual_seed(0)
    slots = torch.cat((torch.randperm(num_slots - 1, generator=generator)[:20], torch.full((3,), num_slots - 1)))
    numbers = torch.randint(3000, (NUM_ROW_FIELDS, num_slots), generator=generator)
    numbers[RowField.SEED] += 2**40
    tables = torch.randint(10**6, (num_slots, 200), generator=generator, dtype=torch.int32)
    slots, numbers, tables = slots.to(device), numbers.to(device), tables.to(device)
    numbers[RowField.POSITION, -1] = 0
    temperatures = torch.rand(num_slots, generator=generator).to(device)
    expected_numbers = numbers.clone()
    for step in range(18):
        row_numbers, *rows = backend.gather_rows(slots, numbers, temperatures, tables, block_size)
        expected_row_numbers, *expected = reference.gather_rows(
            slots, expected_numbers, temperatures, tables, block_size
        )
        in_use = torch.arange(200, device=device) < -(-expected[3][:, None] // block_size)
        rows[1], expected[1] = rows[1][in_use], expected[1][in_use]
        torch.testing.assert_close([row_numbers, *rows], [expected_row_numbers, *expected], atol=0, rtol=0)
        tokens = torch.randint(10**6, (len(slots),), generator=generator).to(device)
        tokens[-3:] = step
        tokens[:2] = -1  # no token: 0 is fed
        backend.advance_rows(slots, row_numbers, tokens, numbers, num_slots - 1)
        reference.advance_rows(slots, row_numbers, tokens, expected_numbers, num_slots - 1)
        # The padding row's index is its own.
        assert torch.equal(numbers[:, :-1], expected_numbers[:, :-1])
        assert numbers[RowField.POSITION, -1] == 0


def check_steps(
    backend: Kernels, *, device: str, dtype: torch.dtype, block_size: int, seed: int, has_fp8_kv: bool = False
) -> None:
    """Chunks of prompts and decode steps in random order, padded as in graphs, in a pool that begins as NaN.

    What a step leaves behind in a block's unused places must not reach the answers of later ones.
    """
    reference, rng = torch_reference.Backend(), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim, num_blocks = 4, 2, 64, 20
    shape = (num_blocks + 1, 2, num_kv_heads, block_size, head_dim)
    pool_type, kv_scales = (E4M3, torch.full(shape[1:3], 0.02, device=device)) if has_fp8_kv else (dtype, None)
    pool, expected_pool = (torch.full(shape, float("nan"), dtype=pool_type, device=device) for _ in range(2))
    weights = (torch.ones(head_dim, dtype=dtype, device=device),) * 2
    angles = torch.rand(num_blocks * block_size, head_dim // 2, generator=generator).to(device)
    free = rng.sample(range(num_blocks), num_blocks)
    running: list[dict] = []
    for _ in range(10):
        if len(running) == 3 and rng.random() < 0.3:
            free += running.pop(rng.randrange(3))["table"]
        while len(running) < 3 and len(free) > 6:
            length = rng.choice([1, block_size - 1, block_size, block_size + 1, rng.randint(1, 2 * block_size)])
            running.append({"prompt_len": length, "num_stored": 0, "table": []})
        prefilling = [request for request in running if request["num_stored"] < request["prompt_len"]]
        is_decode = len(prefilling) < len(running) and (not prefilling or rng.random() < 0.6)
        if is_decode:
            spans = [(request, 1) for request in running if request not in prefilling]
        else:
            most = rng.choice([1, 3, 40, 64, 150])
            spans = [(r, min(most, r["prompt_len"] - r["num_stored"])) for r in prefilling]
        slots, positions, tables, contexts, ends = [], [], [], [], [0]
        for request, count in spans:
            start, end = request["num_stored"], request["num_stored"] + count
            while len(request["table"]) * block_size < end:
                request["table"].append(free.pop())
            places = range(start, end)
            slots += [request["table"][place // block_size] * block_size + place % block_size for place in places]
            positions += places
            request["num_stored"] = end
            tables.append(request["table"])
            contexts.append(end)
            ends.append(ends[-1] + count)
        num_tokens, num_padding = len(slots), rng.choice([0, 2, 5])
        if is_decode:
            slots += [num_blocks * block_size] * num_padding
            ends += [num_tokens + row for row in range(1, num_padding + 1)]
        else:
            slots += [(num_blocks + 1) * block_size - 1] * num_padding
            ends += [num_tokens] * num_padding
        positions += [0] * num_padding
        contexts += [1 if is_decode else 0] * num_padding
        tables += [[num_blocks]] * num_padding
        block_tables = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
        for row, table in enumerate(tables):
            block_tables[row, : len(table)] = torch.tensor(table)
        metadata = AttentionMetadata(
            slot_mapping=torch.tensor(slots, device=device),
            block_tables=block_tables.to(device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            query_starts=torch.tensor(ends, dtype=torch.int32, device=device),
            max_query_len=1 if is_decode else max(len(slots), 2),
            max_context_len=max(contexts),
        )
        qkv = torch.randn(len(slots), (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(device, dtype)
        qkv[num_tokens:] = 1e4
        arguments = (qkv, *weights, 1e-6, torch.tensor(positions, device=device), angles.cos(), angles.sin())
        query = backend.norm_rotate_store(*arguments, pool, metadata.slot_mapping, kv_scales)
        expected_query = reference.norm_rotate_store(*arguments, expected_pool, metadata.slot_mapping, kv_scales)
        output = backend.attend(query, pool, metadata, 0.125, None, kv_scales)[:num_tokens].float()
        wide_pool = expected_pool if has_fp8_kv else expected_pool.float()
        expected = reference.attend(expected_query.float(), wide_pool, metadata, 0.125, None, kv_scales)[:num_tokens]
        allowed = 3e-2 if has_fp8_kv else 1e-2  # a key may be rounded the other way
        assert (output - expected).norm() < allowed * expected.norm(), "reads what is not the request's"
