"""The experts of a layer by a backend, against the same numbers in float64 and against the torch reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from nanovllm.kernels import AttentionMetadata, ExpertWeights, Kernels, torch_reference
from nanovllm.utils.fp8 import Fp8Format, ScaledWeight, dequantized, quantize

EPS = 1e-6
FLIPPED = 0.075
"""Largest error of a token of whose FP8 inputs some are rounded the other way."""
CLEAR_GAP = 0.02
"""Tokens whose last chosen expert is nearer than this to the next one, in logits, may choose the other."""


@dataclass(frozen=True)
class Sizes:
    """A layer of experts."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    renormalizes: bool = True


def make_experts(
    sizes: Sizes, *, device: str, dtype: torch.dtype, quantization: Fp8Format | None, seed: int = 1
) -> ExpertWeights:
    """Normal weights of about unit length; those of the experts quantized where there is a format."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5

    def stacked(rows: list[int], columns: int) -> torch.Tensor | ScaledWeight:
        wide = normal(sum(rows), columns)
        if quantization is None:
            return wide.to(dtype)
        weight = quantization.empty_weight(rows, columns, torch.device(device))
        first = 0
        for size in rows:
            weight.rows(slice(first, first + size)).quantize(wide[first : first + size])
            first += size
        return weight

    count, between = sizes.num_experts, sizes.intermediate
    return ExpertWeights(
        (4 * normal(count, sizes.hidden)).to(dtype),
        stacked([between, between] * count, sizes.hidden),
        stacked([sizes.hidden] * count, between),
        sizes.top_k,
        sizes.renormalizes,
    )


def make_metadata(num_tokens: int, padding: list[int], device: str) -> AttentionMetadata:
    """The metadata of a step in which the tokens of these numbers are padding."""
    slots = torch.arange(num_tokens, device=device)
    slots[padding] = 1000 * num_tokens + 3
    empty = torch.zeros(1, dtype=torch.int32, device=device)
    return AttentionMetadata(slots, empty, empty, empty, 1, 1, padding_slot=1000 * num_tokens)


def in_float64(normed: torch.Tensor, experts: ExpertWeights, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the chosen experts give, and the weights, with each product and sum in float64."""
    logits = normed.double() @ experts.router.double().T
    probabilities = logits.softmax(-1).gather(1, chosen.clamp(min=0))
    if experts.renormalizes:
        probabilities /= probabilities.sum(-1, keepdim=True)
    output = torch.zeros(normed.shape, dtype=torch.float64, device=normed.device)
    for expert in range(experts.num_experts):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        gate_up, down = experts.of(expert)
        gate, up = _times(normed[tokens], gate_up).chunk(2, dim=-1)
        results = _times(functional.silu(gate) * up, down)
        output.index_add_(0, tokens, results * probabilities[tokens, places, None])
    return output, probabilities


def _times(x: torch.Tensor, weight: torch.Tensor | ScaledWeight) -> torch.Tensor:
    if isinstance(weight, ScaledWeight):
        x = dequantized(*quantize(x.float(), 1, weight.block), 1, weight.block)
        return x.double() @ weight.dequantized().double().T
    return x.double() @ weight.double().T


def check_experts(
    backend: Kernels,
    sizes: Sizes,
    *,
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    tolerance: float,
    quantization: Fp8Format | None = None,
    padding: list[int] | None = None,
    has_residual: bool = True,
    num_sms: int | None = None,
) -> None:
    """A layer against float64: tokens, each by itself, and padding, which gives 0."""
    experts = make_experts(sizes, device=device, dtype=dtype, quantization=quantization)
    generator = torch.Generator(device).manual_seed(2)
    norm = ((1 + 0.1 * torch.randn(sizes.hidden, generator=generator, device=device)).to(dtype), EPS)
    x, residual = (
        torch.randn(4 * num_tokens, sizes.hidden, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    normed, _ = torch_reference.Backend().add_rms_norm(x, residual if has_residual else None, *norm)
    # Of four times as many, those for which it is the clearest which experts they pass.
    clearest = _gaps(normed, experts).topk(num_tokens).indices.sort().values
    x, residual = x[clearest], residual[clearest]
    metadata = None if padding is None else make_metadata(num_tokens, padding, device)
    other = residual if has_residual else None
    normed, total = torch_reference.Backend().add_rms_norm(x, other, *norm)
    chosen, _ = torch_reference.route(normed, experts, metadata)
    expected, _ = in_float64(normed, experts, chosen)
    results = [backend.norm_experts(x, other, norm, experts, metadata, num_sms) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0]), "whatever the order in which experts got their tokens"
    output, their_total = results[0]
    assert output.dtype == dtype
    torch.testing.assert_close(their_total, total)
    is_clear = _gaps(normed, experts) > CLEAR_GAP
    assert is_clear.double().mean() > 0.9
    is_token = torch.ones(num_tokens, dtype=torch.bool, device=device)
    is_token[padding or []] = False
    assert not output[~is_token].any(), "padding gives 0"
    compared = is_clear & is_token
    errors = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
    if not is_token.any():
        return
    # A rounding may let single inputs of down be quantized the other way; what is quantized otherwise, all of them.
    typical, worst = errors[compared].median(), errors[compared].max()
    allowed = tolerance if quantization is None else FLIPPED
    assert typical < tolerance, f"{num_tokens} tokens, {sizes}, {quantization}: {typical}"
    assert worst < allowed, f"{num_tokens} tokens, {sizes}, {quantization}: {worst}"


def _gaps(normed: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """[T]: by how much the logit of the last expert that a token passes is above the next one's."""
    ordered = (normed.double() @ experts.router.double().T).sort(descending=True).values
    ordered = functional.pad(ordered, (0, 1), value=-1e9)
    return ordered[:, experts.top_k - 1] - ordered[:, experts.top_k]


def check_ties(backend: Kernels, *, device: str, dtype: torch.dtype) -> None:
    """The first of several experts with equal probabilities is chosen: exactly what the reference gives."""
    sizes = Sizes(6, 2, 64, 32)
    experts = make_experts(sizes, device=device, dtype=dtype, quantization=None)
    # Each picks one of three inputs: no sum rounds.
    experts.router.zero_()
    experts.router[torch.arange(6), torch.arange(6) % 3] = 1.0
    norm = torch.ones(64, device=device, dtype=dtype), EPS
    x = torch.randn(9, 64, device=device, generator=torch.Generator(device).manual_seed(3)).to(dtype)
    chosen, _ = torch_reference.route(torch_reference.Backend().add_rms_norm(x, None, *norm)[0], experts, None)
    assert (chosen[:, 1] == chosen[:, 0] + 3).all()
    output, _ = backend.norm_experts(x, None, norm, experts)
    expected, _ = torch_reference.Backend().norm_experts(x, None, norm, experts)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    experts.router.zero_()
    output, _ = backend.norm_experts(x, None, norm, experts)
    expected, _ = torch_reference.Backend().norm_experts(x, None, norm, experts)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def check_all_to_one(backend: Kernels, *, device: str, dtype: torch.dtype, num_tokens: int) -> None:
    """All tokens pass one expert, in as many tiles as it takes; its weights are those of a plain FFN then."""
    sizes = Sizes(7, 1, 64, 32)
    experts = make_experts(sizes, device=device, dtype=dtype, quantization=None)
    experts.router.zero_()
    experts.router[4] = 1.0
    norm = torch.ones(64, device=device, dtype=dtype), EPS
    x = torch.rand(num_tokens, 64, device=device, generator=torch.Generator(device).manual_seed(3)).to(dtype)
    output, total = backend.norm_experts(x, None, norm, experts)
    assert torch.equal(total, x)
    reference = torch_reference.Backend()
    gate_up, down = experts.of(4)
    activated, _ = reference.norm_gated_linear(x, None, norm, gate_up, None)
    torch.testing.assert_close(output, reference.linear(activated, down, None), rtol=1e-2, atol=1e-2)


def check_not_finite(backend: Kernels, *, device: str, dtype: torch.dtype, quantization: Fp8Format | None) -> None:
    """A token that is not finite spoils itself alone, and its experts are as many as any token's."""
    sizes = Sizes(8, 2, 256, 128)
    experts = make_experts(sizes, device=device, dtype=dtype, quantization=quantization)
    norm = torch.ones(256, device=device, dtype=dtype), EPS
    x = torch.randn(40, 256, device=device, generator=torch.Generator(device).manual_seed(3)).to(dtype)
    clean, _ = backend.norm_experts(x, None, norm, experts)
    x[1, 7], x[2, 100] = float("nan"), float("inf")
    x[20:30] = float("nan")
    output, _ = backend.norm_experts(x, None, norm, experts)
    spoiled = [1, 2, *range(20, 30)]
    is_spoiled = torch.zeros(40, dtype=torch.bool)
    is_spoiled[spoiled] = True
    assert output.isfinite().all(dim=1).tolist() == (~is_spoiled).tolist()
    ours, theirs = (one[~is_spoiled.to(device)].double() for one in (output, clean))
    allowed = 1e-2 if dtype != torch.float32 else 1e-5
    assert (ours - theirs).norm() < (allowed if quantization is None else FLIPPED) * theirs.norm()
