"""One model on one device: weights, KV pool, forward passes. Runs what it is told; decides nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch

from nanovllm.engine.execution.cuda_graph import StepGraphs, StepOutput, token_buckets
from nanovllm.engine.execution.decode_paths import DecodePaths, PipelineOptions
from nanovllm.engine.execution.device_decode_batch import DeviceDecodeBatch
from nanovllm.engine.execution.kv_copy import COPY_METHODS, checksum_layers
from nanovllm.engine.execution.model_inputs import ModelInputs, SamplingArrays, largest_step, sampling_arrays
from nanovllm.engine.execution.prefill_buffers import PrefillBuffers
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.execution.tasks import DecodeTask, PrefillTask, Task
from nanovllm.engine.execution.worker_group import NoWorkers, WorkerGroup
from nanovllm.engine.observability.pipeline_statistics import lines
from nanovllm.engine.scheduler import MOST_PREFILL_REQUESTS, BlockPair, PrefillStep, Step
from nanovllm.engine.scheduling.decode_batch import DecodeStep
from nanovllm.engine.scheduling.pipeline_plan import Arrangement
from nanovllm.errors import DeviceError, HandoffError, ModelLoadError, OutOfKVCacheError, short_repr
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.ranks import OneRank, Ranks
from nanovllm.layers.sampler import SampledTokens, sample
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.checkpoint import first_names
from nanovllm.utils.device import Device, DeviceClock, Event, Moment, enable_peer_access, wait_event
from nanovllm.utils.loader import fill_randomly, load_weights

logger = logging.getLogger(__name__)

GIB = 1024**3
CPU_POOL_BYTES = 512 * 1024**2


class ModelRunner:
    """A model's weights, KV pool and streams on one device.

    Args:
        spec: model and sizes.
        device: where everything lives; whichever device is current elsewhere does not matter.
        is_decode_runner: whether decode steps run here (they may run beside prefill steps).
        max_step_tokens: most tokens of a step; workspace for them is kept free.
        weights_of: a runner to copy the weights from, instead of reading them.
        push_to: a runner into whose pool prefill steps push the blocks that they hand over; of the same spec.
        pipeline: how decode steps use SM partitions, None for plain decode.
        ranks: those that compute the model together; every one of them makes its runner at the same time.
        workers: on the first rank, the others.

    Raises:
        GreenContextError: the SMs can be split, but not as `pipeline` has it.
        ModelLoadError: the weights cannot be loaded or do not fit.
        OutOfKVCacheError: the KV pool does not fit.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        device: Device,
        *,
        is_decode_runner: bool,
        max_step_tokens: int,
        weights_of: ModelRunner | None = None,
        push_to: ModelRunner | None = None,
        pipeline: PipelineOptions | None = None,
        ranks: Ranks | None = None,
        workers: WorkerGroup | None = None,
    ) -> None:
        self.spec = spec
        self._ranks = OneRank() if ranks is None else ranks
        self._workers = NoWorkers() if workers is None else workers
        self._push_pool = None if push_to is None else push_to.kv_pool
        self.device = device
        self.clock: DeviceClock | None = None
        """Times steps and copies, for a trace."""
        self.is_decode_runner = is_decode_runner
        self.max_step_tokens = max(max_step_tokens, spec.max_num_seqs) if is_decode_runner else max_step_tokens
        with device.current():
            self.stream = torch.cuda.Stream(device.index) if device.is_cuda else None
            # What is pushed beside a layer gets SMs before the layer's own thread blocks that still wait for one.
            self.copy_stream = torch.cuda.Stream(device.index, priority=-1) if device.is_cuda else None
        self._logits: torch.Tensor | None = None
        with self._on(self.stream):
            self.model = self._load_model(weights_of)
            # None waits in a collective, which must end in time, for one that loads longer.
            self._ranks.all_reduce_min(0)
            self.decode_paths = DecodePaths(self, pipeline) if is_decode_runner else None
            self.num_kv_blocks = self._num_kv_blocks()
            # One block more than there are to give out: what pads a step is written to it.
            self.kv_pool: torch.Tensor = self._make_pool(self.num_kv_blocks + 1)
            self.prefill_buffers = self._make_prefill_buffers(max_step_tokens)
            self.decode_rows = self._make_decode_rows() if is_decode_runner else None
            if push_to is not None and device.is_cuda:
                enable_peer_access(device, push_to.device)
            self._prefill_graphs, self.graph_pool = self._capture_prefill()
            if self.decode_paths is not None:
                self.decode_paths.prepare()
        self.synchronize()  # other streams are about to read the weights and write to the pool

    @property
    def block_size(self) -> int:
        return self.spec.attention.block_size

    def launch(self, step: Step) -> StepHandle:
        """Starts a step, here and on the other ranks; nothing here waits for the device."""
        with self._on(self.stream):
            began = None if self.clock is None else self.clock.record_moment()
            task = self._prefill_task(step) if isinstance(step, PrefillStep) else self._decode_task(step)
            positions = None if isinstance(step, PrefillStep) else step.positions
            with self._workers.dispatch(task):
                return StepHandle(self.device, self.run(task, positions), began)

    def run(self, task: Task, positions: np.ndarray | None = None) -> SampledTokens | None:
        """A rank's share of a step; what it samples, which every rank has.

        Args:
            task: made by the first rank.
            positions: [B] int64 of the tokens that a decode step is fed, by which a pipeline chooses its way.
        """
        with self._on(self.stream):
            return self._run_prefill(task) if isinstance(task, PrefillTask) else self._run_decode(task, positions)

    def run_prefill_core(self, size: int) -> StepOutput:
        """The buffered prefill step, padded to `size` tokens and to all the requests that there could be."""
        output = self._run(self.prefill_buffers.gather(size, self.prefill_buffers.max_num_requests))
        assert output is not None, "a step that is padded to some requests samples for them"
        return output

    def forget_device_batch(self) -> None:
        """What a decode step that could not be launched has left of the batch on the device is not used again."""
        if self.decode_rows is not None:
            self.decode_rows.forget()

    def run_decode_core(self, size: int, arrangement: Arrangement | None = None) -> StepOutput:
        """One decode step over the first `size` rows of the batch, on the device alone: no host value is read.

        By the pipeline, arranged so, or plain.
        """
        assert self.decode_rows is not None, f"{self.device} was made for prefill, it cannot run a decode step"
        assert self.decode_paths is not None, f"{self.device} was made for prefill, it cannot run a decode step"
        inputs, lane_moments = self.decode_rows.gather(size), None
        if arrangement is not None:
            pipeline = self.decode_paths.pipeline
            assert pipeline is not None, "an arrangement is of a pipeline"
            hidden = pipeline.decode_token(
                inputs.input_ids, inputs.positions, self.kv_pool, inputs.metadata, arrangement
            )
            lane_moments = pipeline.clock.last
        else:
            hidden = self.model(inputs.input_ids, inputs.positions, self.kv_pool, self._planned(inputs.metadata))
        logits = self._compute_logits(hidden)
        sampled = sample(logits, inputs.sampling, self.spec.attention.backend, self._ranks)
        self.decode_rows.advance(inputs, sampled.token_ids)
        return StepOutput(logits, sampled, lane_moments)

    def _prefill_task(self, step: PrefillStep) -> PrefillTask:
        last = [(chunk.seq, chunk.end - chunk.seq.num_prompt_tokens) for chunk in step.rows if chunk.is_last]
        graphs = self._prefill_graphs
        size = step.num_tokens if graphs is None else graphs.size_for(step.num_tokens)
        sampling = None if step.is_plain or not last else sampling_arrays(last, self.spec.model_config.vocab_size)
        return PrefillTask(self.prefill_buffers.pack(step, size), size, len(last), sampling)

    def _decode_task(self, step: DecodeStep) -> DecodeTask:
        assert self.decode_rows is not None, f"{self.device} was made for prefill, it cannot run a decode step"
        sampling = None
        if not step.is_plain:
            rows = [(row.seq, row.output_index) for row in step.rows]
            sampling = sampling_arrays(rows, self.spec.model_config.vocab_size)
        return DecodeTask(self.decode_rows.changes(step), len(step.positions), sampling)

    def _run_prefill(self, task: PrefillTask) -> SampledTokens | None:
        self.prefill_buffers.send(task.numbers)
        if self._prefill_graphs is not None:
            output: StepOutput | None = self._prefill_graphs.replay(task.size)
        else:
            output = self._run(self.prefill_buffers.gather(task.size, task.num_sampled))
        if output is None or not task.num_sampled:
            return None
        if task.sampling is None:
            return SampledTokens(output.sampled.token_ids[: task.num_sampled])
        return self._resampled(output, task.num_sampled, task.sampling)

    def _run_decode(self, task: DecodeTask, positions: np.ndarray | None) -> SampledTokens:
        assert self.decode_rows is not None, f"{self.device} was made for prefill, it cannot run a decode step"
        assert self.decode_paths is not None, f"{self.device} was made for prefill, it cannot run a decode step"
        self.decode_rows.apply(task.changes)
        output = self.decode_paths.replay(task.num_rows, positions)
        if task.sampling is None:
            return SampledTokens(output.sampled.token_ids[: task.num_rows])
        sampled = self._resampled(output, task.num_rows, task.sampling)
        self.decode_rows.correct(sampled.token_ids)
        return sampled

    def _resampled(self, output: StepOutput, num_rows: int, sampling: SamplingArrays) -> SampledTokens:
        """A token for each row, from a step's logits and all parameters.

        Steps sample by temperature, seed and index; where some request filters, wants log-probabilities or may not stop
        yet, only the host knows how.
        """
        return sample(output.logits[:num_rows], sampling.on(self.device), self.spec.attention.backend, self._ranks)

    def _compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # Graphs of all sizes leave their logits in one place: they are large.
        out = None if self._logits is None or len(hidden) > len(self._logits) else self._logits[: len(hidden)]
        return self.model.compute_logits(hidden, out=out)

    def _planned(self, metadata: AttentionMetadata) -> AttentionMetadata:
        plan = self.spec.attention.backend.plan(metadata, self.spec.num_kv_heads)
        return dataclasses.replace(metadata, plan=plan)

    def sync_kv_cache_to(
        self, other: ModelRunner, pairs: SequenceOf[BlockPair], *, method: str = "copy", after: Event | None = None
    ) -> Event:
        """Copies blocks of this pool into another runner's, on streams of their own; waits for nothing.

        Args:
            other: the runner whose pool receives them; of the same spec.
            pairs: (block of this pool, block of the other pool), any number.
            method: `copy` (torch's copies), `push` (one kernel, over peer access) or `staged` (through pinned host
                memory, for GPUs without peer access).
            after: an event of this device that the copies wait for, such as the step that computes the blocks.

        Returns:
            An event that is done when all blocks have arrived.

        Raises:
            HandoffError: the method or a block is unknown; nothing was copied.
        """
        if method not in COPY_METHODS:
            raise HandoffError(f"method={short_repr(method)} is not one of {', '.join(COPY_METHODS)}")
        for block, goal in pairs:
            if not (0 <= block < self.num_kv_blocks and 0 <= goal < other.num_kv_blocks):
                raise HandoffError(
                    f"blocks ({block}, {goal}) are not below ({self.num_kv_blocks}, {other.num_kv_blocks}), "
                    "what the two pools have"
                )
        with other._on(other.copy_stream), self._on(self.copy_stream):
            wait_event(self.copy_stream, after)
            try:
                COPY_METHODS[method](self, other, pairs)
            except BaseException:
                # Nobody will know of the copies that were launched: they must not be left to write later.
                self.synchronize()
                other.synchronize()
                raise
            return (self if method == "push" else other).record_copy_event()

    def record_copy_event(self) -> Event:
        """An event after all copies that were launched on this device."""
        with self._on(self.copy_stream):
            return self.device.record_event()

    def record_copy_moment(self, after: Event | None = None) -> Moment | None:
        """When this device's copies have got here, and `after` is done; None if nothing is timed."""
        if self.clock is None:
            return None
        with self._on(self.copy_stream):
            wait_event(self.copy_stream, after)
            return self.clock.record_moment()

    def wait_for(self, event: Event) -> None:
        """What is launched here from now on runs after `event`, of any device."""
        wait_event(self.stream, event)

    def checksum_blocks(self, blocks: SequenceOf[int], after: Event) -> torch.Tensor:
        """One number for each block and layer, [N, num_layers] int64 on the host, computed after `after`; waits for it.

        Any changed word shows.
        """
        with self._on(self.copy_stream):
            wait_event(self.copy_stream, after)
            return torch.stack([checksum_layers(self.kv_pool[block]) for block in blocks]).cpu()

    def synchronize(self, *, copies: bool = True) -> None:
        """Waits for all steps, and copies, that were launched here.

        Raises:
            DeviceError: they do not end within `step_timeout_s`.
        """
        step_timeout_s = self.spec.step_timeout_s
        deadline_s = time.monotonic() + step_timeout_s
        for stream in (self.stream, self.copy_stream if copies else None):
            # Not by the driver, in which an interrupt is not heard.
            while stream is not None and not stream.query():
                if time.monotonic() > deadline_s:
                    late = DeviceError(f"{self.device} is lost: its work has not ended within {step_timeout_s=}")
                    raise self._workers.diagnose(late)
                self._workers.check()
                time.sleep(0)
        self._workers.check()  # what waited for one that is gone was ended

    def check_workers(self) -> None:
        """Raises WorkerError if another rank is gone."""
        self._workers.check()

    def diagnose(self, error: DeviceError) -> BaseException:
        """What it means that this device is late: with other ranks, that one of them is."""
        return self._workers.diagnose(error)

    def close_workers(self) -> None:
        """Ends the other ranks."""
        self._workers.close()

    def close(self) -> None:
        """Gives weights and pool back, which nothing may be using; the runner is of no use afterwards."""
        with self._on(self.stream):
            if self.decode_paths is not None:
                self.decode_paths.close()
            del self.model, self.kv_pool, self.prefill_buffers, self.decode_rows
            del self._prefill_graphs, self.graph_pool, self._logits, self._push_pool
            self._ranks.close()
            if self.device.is_cuda:
                torch.cuda.empty_cache()

    def _run(self, inputs: ModelInputs, pool: torch.Tensor | None = None) -> StepOutput | None:
        kv_pool = self.kv_pool if pool is None else pool
        metadata = self._planned(inputs.metadata)
        if inputs.pushed_blocks is not None:
            metadata = dataclasses.replace(metadata, after_store=self._pusher(inputs.pushed_blocks))
        hidden = self.model(inputs.input_ids, inputs.positions, kv_pool, metadata)
        if inputs.sampling is None:
            self._join_pushes()
            return None
        logits = self._compute_logits(hidden[inputs.sampled_rows])
        sampled = sample(logits, inputs.sampling, self.spec.attention.backend, self._ranks)
        self._join_pushes()
        return StepOutput(logits, sampled)

    def _pusher(self, pushed_blocks: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """Stores a layer's KV of the blocks in the other runner's pool, while the layer attends to it.

        Beside GEMMs it would hold them up for as long as it takes: they count on every SM for an equal share.
        """
        assert self._push_pool is not None, "a step has blocks to push only if there is a pool to push them to"
        targets = iter(self._push_pool.unbind(1))

        def push(kv_cache: torch.Tensor) -> None:
            target = next(targets)
            if self.copy_stream is None:
                blocks, goals = pushed_blocks[1 : 1 + 2 * int(pushed_blocks[0])].view(-1, 2).unbind(1)
                target[goals] = kv_cache[blocks]
                return
            # It needs triton, which a machine without GPUs may lack.
            from nanovllm.kernels.triton_transfer import NUM_PROGRAMS_BESIDE, push_blocks

            self.copy_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.copy_stream):
                push_blocks(kv_cache, target, pushed_blocks, NUM_PROGRAMS_BESIDE)

        return push

    def _join_pushes(self) -> None:
        if self._push_pool is not None and self.copy_stream is not None:
            torch.cuda.current_stream().wait_stream(self.copy_stream)

    @contextlib.contextmanager
    def _on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Makes this device and one of its streams, none on a CPU, the current ones; a caller's autocast is left."""
        on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        kind = self.device.kind
        as_written = (
            torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        )
        with torch.inference_mode(), as_written, self.device.current(), on_stream:
            yield

    def _load_model(self, weights_of: ModelRunner | None) -> CausalLM:
        spec = self.spec
        self._check_weights_fit()
        model = self._make_model(self.device.torch_device)
        if weights_of is not None:
            theirs = weights_of.model.checkpoint_tensors()
            for name, weight in model.checkpoint_tensors().items():
                weight.copy_from(theirs[name])
        elif spec.load_format == "dummy":
            fill_randomly(model.checkpoint_tensors(), spec.seed)
        else:
            unused = load_weights(
                spec.folder,
                model.checkpoint_tensors(),
                model.ignored_checkpoint_tensors(),
                model.substitute_checkpoint_tensors(),
            )
            if unused and not model.ranks.rank:
                logger.warning("%s has tensors that no layer takes: %s", spec.folder, first_names(unused))
        return model

    def get_pipeline_statistics(self) -> dict[str, Any]:
        """What the decode pipeline has done since the start; times of its lanes only with `decode_pipeline_profiling`.

        Waits for the device if the lanes are timed.
        """
        assert self.decode_paths is not None, f"{self.device} was made for prefill"
        with self._on(self.stream):
            return self.decode_paths.get_statistics()

    def take_lane_times(self) -> None:
        """Takes in lane times of decode steps that have ended, for metrics and the trace."""
        if self.decode_paths is not None:
            with self._on(self.stream):
                self.decode_paths.take_times()

    def print_pipeline_statistics(self) -> None:
        """The same as a table."""
        print("\n".join(lines(self.get_pipeline_statistics(), str(self.device))))  # noqa: T201 - what it is for

    def _make_prefill_buffers(self, max_step_tokens: int) -> PrefillBuffers:
        # The KV of a step's tokens is in the pool.
        max_num_tokens = min(max_step_tokens, self.num_kv_blocks * self.block_size)
        max_num_requests = min(MOST_PREFILL_REQUESTS, self.spec.max_num_seqs)
        longest = self.spec.max_model_len
        return PrefillBuffers(
            self.device,
            max_num_tokens,
            max_num_requests,
            longest,
            self.block_size,
            self.num_kv_blocks,
            pushes=self._push_pool is not None,
        )

    def _make_decode_rows(self) -> DeviceDecodeBatch:
        # A decoding request has a block to itself, the one it writes to.
        most_rows = min(self.spec.max_num_seqs, self.num_kv_blocks)
        backend = self.spec.attention.backend
        return DeviceDecodeBatch(
            self.device, backend, most_rows, self.spec.max_model_len, self.block_size, self.num_kv_blocks
        )

    @property
    def uses_graphs(self) -> bool:
        """Whether steps run from CUDA graphs."""
        return self.device.is_cuda and self.spec.attention.backend.is_capturable and not self.spec.enforce_eager

    def _capture_prefill(self) -> tuple[StepGraphs | None, Any]:
        """The graphs of prefill steps, and the memory that all graphs share."""
        if not self.uses_graphs:
            logger.info("%s: no graphs, the %s backend runs eagerly", self.device, self.spec.attention.backend.name)
            return None, None
        pool = torch.cuda.graph_pool_handle()
        most_rows = max(self.prefill_buffers.max_num_requests, self.decode_rows.max_num_rows if self.decode_rows else 0)
        self._logits = torch.empty(
            most_rows,
            self.spec.model_config.vocab_size // self._ranks.size,
            dtype=self.spec.dtype,
            device=self.device.torch_device,
        )
        # The first tokens of block 0 are written to meanwhile; no request has it yet.
        sizes = token_buckets(self.prefill_buffers.max_num_tokens)
        return StepGraphs("prefill", self.run_prefill_core, sizes, pool), pool

    def _make_model(self, device: torch.device) -> CausalLM:
        spec = self.spec
        return spec.model_class(
            spec.model_config,
            spec.attention.backend,
            spec.max_model_len,
            dtype=spec.dtype,
            device=device,
            ranks=self._ranks,
        )

    def _check_weights_fit(self) -> None:
        weights = self._make_model(torch.device("meta")).checkpoint_tensors()
        needed = sum(weight.nbytes for weight in weights.values())
        available = self.device.memory_info()[0] if self.device.is_cuda else _host_memory_bytes()
        if needed > available:
            raise ModelLoadError(
                f"the weights take {needed / GIB:.2f} GiB, {self.device} has {available / GIB:.2f} GiB free: "
                f"{(needed - available) / GIB:.2f} GiB are missing; free memory there or choose another device"
            )

    # The KV pool

    def _make_pool(self, num_blocks: int) -> torch.Tensor:
        config = self.spec.model_config
        shape = (
            num_blocks,
            config.num_hidden_layers,
            2,
            self.spec.num_kv_heads,
            self.block_size,
            config.head_dim,
        )
        try:
            return torch.zeros(shape, dtype=self.spec.dtype, device=self.device.torch_device)
        except RuntimeError as error:
            raise OutOfKVCacheError(
                f"{self.device} refused {num_blocks * self.spec.block_bytes / GIB:.2f} GiB for the KV pool ({error}); "
                "lower num_kvcache_blocks or gpu_memory_utilization"
            ) from error

    def _num_kv_blocks(self) -> int:
        if self.device.is_cuda:
            available = self._gpu_bytes_for_pool()
            where = f"{self.device} at gpu_memory_utilization={self.spec.gpu_memory_utilization}"
            remedy = "lower num_kvcache_blocks, max_num_batched_tokens or max_num_seqs, or raise gpu_memory_utilization"
            default = available // self.spec.block_bytes - 1
        else:
            available, where = _host_memory_bytes(), "this machine's memory"
            remedy = "lower num_kvcache_blocks, kvcache_block_size or max_model_len"
            one_request = -(-self.spec.max_model_len // self.block_size)
            default = max(CPU_POOL_BYTES // self.spec.block_bytes, one_request)
        num_blocks = max(self.spec.num_kvcache_blocks or default, 1)
        needed = (num_blocks + 1) * self.spec.block_bytes
        if needed > available:
            raise OutOfKVCacheError(
                f"a KV pool of {num_blocks} blocks and a spare one takes {needed / GIB:.2f} GiB, but {where} leaves "
                f"{max(available, 0) / GIB:.2f} GiB for it; {remedy}"
            )
        num_blocks = self._ranks.all_reduce_min(num_blocks)
        gib = (num_blocks + 1) * self.spec.block_bytes / GIB
        logger.info("%s: KV pool of %d blocks of %d tokens, %.2f GiB", self.device, num_blocks, self.block_size, gib)
        return num_blocks

    def _gpu_bytes_for_pool(self) -> int:
        """What `gpu_memory_utilization` leaves beside weights, the workspace of the largest step and other users."""
        torch.cuda.reset_peak_memory_stats(self.device.index)
        before = torch.cuda.memory_allocated(self.device.index)
        try:
            most_rows = max(self.spec.max_num_seqs if self.is_decode_runner else 1, MOST_PREFILL_REQUESTS)
            largest = largest_step(
                self.device.torch_device,
                num_tokens=self.max_step_tokens,
                num_rows=min(most_rows, self.max_step_tokens),
                block_size=self.block_size,
                max_model_len=self.spec.max_model_len,
                vocab_size=self.spec.model_config.vocab_size,
            )
            self._run(largest, pool=self._make_pool(1))
        except torch.OutOfMemoryError as error:
            raise OutOfKVCacheError(
                f"{self.device} has no room for a step of {self.max_step_tokens} tokens ({error}); "
                "lower max_num_batched_tokens or max_num_seqs"
            ) from error
        torch.cuda.synchronize(self.device.index)
        workspace = torch.cuda.max_memory_allocated(self.device.index) - before
        if self.uses_graphs:
            workspace *= 2  # the graphs keep one of their own
        free, total = self.device.memory_info()
        return int(total * self.spec.gpu_memory_utilization) - (total - free) - workspace


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
