"""The spec that the runners of one engine share, and the options of the decode pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.kernels import ResolvedBackend
from nanovllm.models.decoder import CausalLM
from nanovllm.models.description import ModelDescription
from nanovllm.utils.device import Device
from nanovllm.utils.fp8 import E4M3


@dataclass(frozen=True)
class RunnerSpec:
    """Model, sizes and limits that the runners of one engine share."""

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

    def uses_graphs(self, device: Device) -> bool:
        """Whether steps on the device run from CUDA graphs."""
        return device.is_cuda and self.attention.backend.is_capturable and not self.enforce_eager

    @property
    def num_heads(self) -> int:
        """Query heads of each rank."""
        return self.model_config.num_attention_heads // self.num_ranks

    @property
    def num_kv_heads(self) -> int:
        """KV heads of each rank."""
        return self.model_config.num_key_value_heads // self.num_ranks

    @property
    def kv_dtype(self) -> torch.dtype:
        """The type in which the pool holds keys and values."""
        return E4M3 if self.model_config.has_fp8_kv else self.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank, all layers."""
        config, tokens = self.model_config, self.attention.block_size
        per_layer = 2 * self.num_kv_heads * tokens * config.head_dim
        return config.num_hidden_layers * per_layer * self.kv_dtype.itemsize


@dataclass(frozen=True)
class PipelineOptions:
    """How decode steps use SM partitions.

    Attributes:
        attention_sm, ffn_sm: SMs of the two lanes, None to have them chosen.
        num_micro_batches: parts of a batch that take turns on the lanes.
        profiling: whether the lanes of every step are timed.
        adaptive: whether the pipeline runs only where it is faster than plain decode.
    """

    attention_sm: int | None = None
    ffn_sm: int | None = None
    num_micro_batches: int = 2
    profiling: bool = False
    adaptive: bool = False

    @property
    def has_split(self) -> bool:
        """Whether at least one of the two SM counts was given."""
        return self.attention_sm is not None or self.ffn_sm is not None
