"""What runners of one engine have in common. Knows nothing of devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.kernels import ResolvedBackend
from nanovllm.models.decoder import CausalLM
from nanovllm.models.description import ModelDescription


@dataclass(frozen=True)
class RunnerSpec:
    """What runners of one engine have in common."""

    folder: Path
    model_class: type[CausalLM]
    model_config: ModelDescription
    attention: ResolvedBackend
    dtype: torch.dtype
    load_format: str
    seed: int
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    num_kvcache_blocks: int | None
    enforce_eager: bool
    step_timeout_s: float
    num_ranks: int = 1

    @property
    def num_kv_heads(self) -> int:
        """KV heads of each rank."""
        return self.model_config.num_key_value_heads // self.num_ranks

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank, all layers."""
        config, tokens = self.model_config, self.attention.block_size
        per_layer = 2 * self.num_kv_heads * tokens * config.head_dim
        return config.num_hidden_layers * per_layer * self.dtype.itemsize
