"""One model on one device: weights, KV pool, forward passes. Runs what it is told; decides nothing."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.engine.model_inputs import ModelInputs, decode_inputs, prefill_inputs
from nanovllm.engine.scheduler import DecodeStep, PrefillStep
from nanovllm.errors import OutOfKVCacheError
from nanovllm.kernels import AttentionMetadata, ResolvedBackend
from nanovllm.layers.sampler import SampledTokens, SamplingInputs, sample
from nanovllm.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from nanovllm.outputs import TokenLogprobs
from nanovllm.utils.device import Device, Event
from nanovllm.utils.loader import fill_randomly, load_weights

logger = logging.getLogger(__name__)

GIB = 1024**3
CPU_POOL_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class RunnerSpec:
    """What runners of one engine have in common."""

    folder: Path
    model_class: type[Qwen3ForCausalLM]
    model_config: Qwen3Config
    attention: ResolvedBackend
    dtype: torch.dtype
    load_format: str
    seed: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    gpu_memory_utilization: float
    num_kvcache_blocks: int | None

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block, all layers."""
        config, tokens = self.model_config, self.attention.block_size
        per_layer = 2 * config.num_key_value_heads * tokens * config.head_dim
        return config.num_hidden_layers * per_layer * self.dtype.itemsize


@dataclass(frozen=True)
class SampledRow:
    token_id: int
    logprobs: TokenLogprobs | None


class StepHandle:
    """A launched step. `collect` waits for it and gives one `SampledRow` for every request that samples in it."""

    def __init__(self, device: Device, sampled: SampledTokens | None) -> None:
        self._host = None if sampled is None else _to_host(sampled, device)
        self._event: Event = device.record_event()

    def is_done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def collect(self) -> list[SampledRow]:
        self.wait()
        return [] if self._host is None else _rows(self._host)


class ModelRunner:
    """A model's weights, KV pool and stream on one device.

    Args:
        spec: model and sizes.
        device: where everything lives; whichever device is current elsewhere does not matter.
        is_decode_runner: whether decode steps run here (they may run beside prefill steps).

    Raises:
        ModelLoadError: the weights cannot be loaded.
        OutOfKVCacheError: the KV pool does not fit.
    """

    def __init__(self, spec: RunnerSpec, device: Device, *, is_decode_runner: bool) -> None:
        self.spec = spec
        self.device = device
        self.is_decode_runner = is_decode_runner
        with device.current():
            self.stream = torch.cuda.Stream(device.index) if device.is_cuda else None
        with self._on_device():
            self.model = self._load_model()
            self.num_kv_blocks = self._num_kv_blocks()
            self.kv_pool = self._make_pool(self.num_kv_blocks)

    @property
    def block_size(self) -> int:
        return self.spec.attention.block_size

    def launch(self, step: PrefillStep | DecodeStep) -> StepHandle:
        """Starts a step; nothing here waits for the device."""
        vocab_size = self.spec.model_config.vocab_size
        with self._on_device():
            if isinstance(step, PrefillStep):
                sampled = self._run(prefill_inputs(step, self.block_size, vocab_size, self.device))
            else:
                sampled = self.run_decode_core(decode_inputs(step, self.block_size, vocab_size, self.device))
            return StepHandle(self.device, sampled)

    def run_decode_core(self, inputs: ModelInputs) -> SampledTokens | None:
        """One decode step on the device, from inputs to sampled tokens."""
        return self._run(inputs)

    def close(self) -> None:
        """Gives weights and pool back; the runner is of no use afterwards."""
        with self._on_device():
            if self.stream is not None:
                self.stream.synchronize()
            del self.model, self.kv_pool
            if self.device.is_cuda:
                torch.cuda.empty_cache()

    def _run(self, inputs: ModelInputs, pool: torch.Tensor | None = None) -> SampledTokens | None:
        kv_pool = self.kv_pool if pool is None else pool
        hidden = self.model(inputs.input_ids, inputs.positions, kv_pool, inputs.metadata)
        if inputs.sampling is None:
            return None
        if inputs.sampled_rows is not None:
            hidden = hidden[inputs.sampled_rows]
        return sample(self.model.compute_logits(hidden), inputs.sampling)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        with torch.inference_mode(), self.device.current():
            if self.stream is None:
                yield
            else:
                with torch.cuda.stream(self.stream):
                    yield

    def _load_model(self) -> Qwen3ForCausalLM:
        spec = self.spec
        model = spec.model_class(
            spec.model_config,
            spec.attention.backend,
            spec.max_model_len,
            dtype=spec.dtype,
            device=self.device.torch_device,
        )
        if spec.load_format == "dummy":
            fill_randomly(model.checkpoint_tensors(), spec.seed)
        else:
            load_weights(spec.folder, model.checkpoint_tensors(), model.ignored_checkpoint_tensors())
        return model

    # The KV pool

    def _make_pool(self, num_blocks: int) -> torch.Tensor:
        config = self.spec.model_config
        shape = (
            num_blocks,
            config.num_hidden_layers,
            2,
            config.num_key_value_heads,
            self.block_size,
            config.head_dim,
        )
        return torch.zeros(shape, dtype=self.spec.dtype, device=self.device.torch_device)

    def _num_kv_blocks(self) -> int:
        if self.device.is_cuda:
            available, where = self._gpu_bytes_for_pool(), f"{self.device} at gpu_memory_utilization"
            where += f"={self.spec.gpu_memory_utilization}"
            default = available // self.spec.block_bytes
        else:
            available, where = _host_memory_bytes(), "this machine's memory"
            one_request = -(-self.spec.max_model_len // self.block_size)
            default = max(CPU_POOL_BYTES // self.spec.block_bytes, one_request)
        num_blocks = self.spec.num_kvcache_blocks or default
        needed = max(num_blocks, 1) * self.spec.block_bytes
        if needed > available:
            raise OutOfKVCacheError(
                f"a KV pool of {max(num_blocks, 1)} blocks takes {needed / GIB:.2f} GiB, but {where} leaves "
                f"{max(available, 0) / GIB:.2f} GiB for it; lower num_kvcache_blocks, max_num_batched_tokens or "
                "max_num_seqs, or raise gpu_memory_utilization"
            )
        logger.info(
            "%s: KV pool of %d blocks of %d tokens, %.2f GiB", self.device, num_blocks, self.block_size, needed / GIB
        )
        return num_blocks

    def _gpu_bytes_for_pool(self) -> int:
        """What `gpu_memory_utilization` leaves beside weights, the workspace of the largest step and other users."""
        torch.cuda.reset_peak_memory_stats(self.device.index)
        before = torch.cuda.memory_allocated(self.device.index)
        self._run(self._largest_step(), pool=self._make_pool(1))
        torch.cuda.synchronize(self.device.index)
        workspace = torch.cuda.max_memory_allocated(self.device.index) - before
        free, total = self.device.memory_info()
        return int(total * self.spec.gpu_memory_utilization) - (total - free) - workspace

    def _largest_step(self) -> ModelInputs:
        """A prefill step of most tokens and most sampled rows, all of them reading and writing block 0."""
        device, spec = self.device.torch_device, self.spec
        num_rows = min(spec.max_num_seqs, spec.max_num_batched_tokens)
        lengths = torch.full((num_rows,), spec.max_num_batched_tokens // num_rows, dtype=torch.int32)
        lengths[0] += spec.max_num_batched_tokens - int(lengths.sum())
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()]) % spec.max_model_len
        longest = int(lengths.max())
        metadata = AttentionMetadata(
            slot_mapping=(positions % self.block_size).to(device),
            block_tables=torch.zeros(num_rows, -(-longest // self.block_size), dtype=torch.int32, device=device),
            context_lens=lengths.to(device),
            query_starts=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device),
            max_query_len=longest,
            max_context_len=longest,
        )
        sampling = SamplingInputs(
            temperatures=torch.ones(num_rows, device=device),
            seeds=torch.arange(num_rows, device=device),
            output_indices=torch.zeros(num_rows, dtype=torch.int64, device=device),
            filters=(
                torch.full((num_rows,), spec.model_config.vocab_size, device=device),
                torch.full((num_rows,), 0.9, device=device),
                torch.zeros(num_rows, device=device),
            ),
            num_logprobs=1,
        )
        tokens = torch.zeros(len(positions), dtype=torch.int64, device=device)
        rows = metadata.query_starts[1:].long() - 1
        return ModelInputs(tokens, positions.to(device), metadata, rows, sampling)


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _to_host(sampled: SampledTokens, device: Device) -> SampledTokens:
    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or not device.is_cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    token_ids = copy(sampled.token_ids)
    assert token_ids is not None, "a step that samples has tokens"
    return SampledTokens(token_ids, copy(sampled.logprobs), copy(sampled.top_token_ids), copy(sampled.top_logprobs))


def _rows(sampled: SampledTokens) -> list[SampledRow]:
    token_ids = sampled.token_ids.tolist()
    if sampled.logprobs is None or sampled.top_token_ids is None or sampled.top_logprobs is None:
        return [SampledRow(token, None) for token in token_ids]
    columns = zip(
        token_ids,
        sampled.logprobs.tolist(),
        sampled.top_token_ids.tolist(),
        sampled.top_logprobs.tolist(),
        strict=True,
    )
    return [
        SampledRow(token, TokenLogprobs(token, logprob, dict(zip(top_ids, top, strict=True))))
        for token, logprob, top_ids, top in columns
    ]
