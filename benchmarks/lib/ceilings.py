"""What bounds a model on its hardware: measured rates, and the bytes and FLOPs of which there cannot be fewer.

The bandwidth is measured in `streaming`, which needs triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.models.description import ModelDescription


def median_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """Median GPU time of a call, by events, after a warm-up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def gemm_rate() -> float:
    """FLOP per second of a large bfloat16 matrix product on random data."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b) * 1e3


def weight_bytes(spec: RunnerSpec, num_tokens: float) -> int:
    """Bytes of the weights that a step of so many tokens reads, on however many ranks; scales of FP8 not counted.

    Of experts, those of as many as are expected where each token's are drawn evenly.
    """
    config = spec.model_config
    in_layers = spec.dtype.itemsize if config.quantization is None else 1
    return (config.num_read(num_tokens) - config.num_unquantized) * in_layers + config.num_unquantized * (
        spec.dtype.itemsize
    )


def kv_bytes_per_token(spec: RunnerSpec) -> float:
    """Bytes of a token's KV on one rank."""
    return spec.block_bytes / spec.attention.block_size


def head_parameters(config: ModelDescription) -> int:
    """Weights of the output head, which is used for fewer tokens than the layers are."""
    return config.vocab_size * config.hidden_size


def linear_flops(config: ModelDescription, num_tokens: int, num_prompts: int) -> int:
    """FLOPs to prefill so many tokens of so many prompts: of all linear layers, and of the head once per prompt."""
    head = head_parameters(config)
    return 2 * ((config.num_parameters - head) * num_tokens + head * num_prompts)
