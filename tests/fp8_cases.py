"""Linear layers with FP8 weights by a backend, against the same numbers in float64 and against the torch reference."""

from __future__ import annotations

import torch

from nanovllm.kernels import Kernels, torch_reference
from nanovllm.utils.fp8 import Fp8Format, ScaledTokens, ScaledWeight, dequantized, quantize


def fp8_weight(num_outputs: int, num_inputs: int, block: int | None, *, device: str, seed: int) -> ScaledWeight:
    """Normal weights of about unit length, quantized."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.randn(num_outputs, num_inputs, generator=generator, device=device) * num_inputs**-0.5
    weight = Fp8Format(block).empty_weight([num_outputs], num_inputs, torch.device(device))
    weight.quantize(wide)
    return weight


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def check_fp8_linear(
    backend: Kernels,
    *,
    device: str,
    dtype: torch.dtype,
    block: int | None,
    num_tokens: int,
    sizes: tuple[int, int],
    tolerance: float,
    num_sms: int | None = None,
) -> None:
    """A linear layer of `sizes` outputs and inputs, with and without a bias, against float64 on the same numbers."""
    weight = fp8_weight(*sizes, block, device=device, seed=1)
    generator = torch.Generator(device).manual_seed(2)
    spread = torch.logspace(-2, 2, num_tokens, device=device)[:, None]
    x = (torch.randn(num_tokens, sizes[1], generator=generator, device=device) * spread).to(dtype)
    bias = torch.randn(sizes[0], generator=generator, device=device).to(dtype)
    tokens = dequantized(*quantize(x, 1, block), 1, block).double()
    products = tokens @ weight.dequantized().double().T
    for one in (None, bias):
        expected = products if one is None else products + one.double()
        results = [backend.linear(x, weight, one, num_sms) for _ in range(2)]
        assert results[0].dtype == dtype
        assert torch.equal(*results), "sums are in the same order each time"
        # Each token by itself: they differ in size.
        errors = (results[0].double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert errors.max() < tolerance, f"{num_tokens} tokens, {sizes}, block {block}: {errors.max()}"


def check_counters(num_tokens: int, sizes: tuple[int, int], block: int | None, *, device: str, num_sms: int) -> None:
    """Layers whose inputs are split among programs leave the counters as they found them: tokens may be used again."""
    from nanovllm.kernels import triton_fp8

    assert triton_fp8.plan(num_tokens, *sizes, num_sms, block).splits > 1
    weight = fp8_weight(*sizes, block, device=device, seed=1)
    tokens = triton_fp8.quantize_tokens(torch.randn(num_tokens, sizes[1], device=device), weight)
    results = [triton_fp8.linear(tokens, weight, None, num_sms) for _ in range(3)]
    assert not tokens.counters.any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def check_fp8_fused(
    backend: Kernels, *, device: str, dtype: torch.dtype, block: int | None, num_tokens: int, size: int
) -> None:
    """Norm, gate and what follows each, against the reference.

    Where the norm's last bit rounds an input the other way, an output changes by some tenths of a percent; inputs that
    are not quantized would change all of them by 2 %. Where the last bit of the largest input changes, so does the
    scale of all.
    """
    reference, tolerance, tolerance_behind = torch_reference.Backend(), 0.012, 0.03
    generator = torch.Generator(device).manual_seed(3)
    x, residual = (torch.randn(num_tokens, size, generator=generator, device=device).to(dtype) for _ in range(2))
    norm = ((1 + 0.1 * torch.randn(size, generator=generator, device=device)).to(dtype), 1e-6)
    ffn = 2 * size
    up, down = (fp8_weight(*it, block, device=device, seed=4) for it in ((2 * ffn, size), (size, ffn)))
    for other in (None, residual):
        outputs, total = backend.norm_linear(x, other, norm, up, None)
        expected, expected_total = reference.norm_linear(x, other, norm, up, None)
        assert relative_difference(outputs, expected) < tolerance
        torch.testing.assert_close(total, expected_total)
        activated, total = backend.norm_gated_linear(x, other, norm, up, None)
        expected, expected_total = reference.norm_gated_linear(x, other, norm, up, None)
        torch.testing.assert_close(total, expected_total)
        if isinstance(activated, ScaledTokens):
            assert activated.dtype == dtype
            assert not activated.counters.any()
            quantized = dequantized(*quantize(expected, 1, block), 1, block)
            values = dequantized(activated.values, activated.scales, 1, block)
            assert relative_difference(values, quantized) < tolerance_behind
        result = backend.linear(activated, down, None)
        assert relative_difference(result, reference.linear(expected, down, None)) < tolerance_behind
        if isinstance(activated, ScaledTokens):
            assert not activated.counters.any(), "left as they were, for the next layer"
