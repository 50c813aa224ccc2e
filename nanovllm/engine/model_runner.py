"""One model on one device: weights, KV pool, forward passes. Runs what it is told; decides nothing."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import abc
from typing import Any

import numpy as np
import torch

from nanovllm.engine.execution.cuda_graph import StepOutput
from nanovllm.engine.execution.decode_executor import DecodeExecutor, NoDecode
from nanovllm.engine.execution.decode_paths import DecodePaths
from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.execution.kv_copy import COPY_METHODS, checksum_layers
from nanovllm.engine.execution.kv_pool import make_kv_pool, num_kv_blocks
from nanovllm.engine.execution.kv_scales import calibrate_kv_scales, check_kv_scales
from nanovllm.engine.execution.layer_exchange import LayerArrivals, LayerExchange
from nanovllm.engine.execution.layer_push import NoPush, PushToPool
from nanovllm.engine.execution.load_model import load_model
from nanovllm.engine.execution.mixed_executor import MixedExecutor, NoMixedSteps
from nanovllm.engine.execution.model_inputs import largest_step
from nanovllm.engine.execution.prefill_executor import PrefillExecutor
from nanovllm.engine.execution.prompt_logprobs import PromptRows, prompt_logprobs
from nanovllm.engine.execution.runner_spec import PipelineOptions, RunnerSpec
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.execution.task_packer import TaskPacker
from nanovllm.engine.execution.tasks import StepTask
from nanovllm.engine.execution.worker_group import NoWorkers, WorkerGroup
from nanovllm.engine.observability.pipeline_statistics import lines
from nanovllm.engine.scheduling.pipeline_plan import Arrangement
from nanovllm.engine.scheduling.step import MAX_CHUNKS, BlockPair, Step
from nanovllm.errors import DeviceError, HandoffError, short_repr
from nanovllm.layers.ranks import OneRank, Ranks
from nanovllm.layers.sampler import SampledTokens
from nanovllm.models.decoder import CausalLM
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.utils.device import Device, DeviceClock, Event, Moment, enable_peer_access, wait_event

logger = logging.getLogger(__name__)


class ModelRunner:
    """A model's weights, KV pool and streams on one device, and what runs prompts and decode rows there.

    Args:
        spec: model and sizes.
        device: where everything lives; whichever device is current elsewhere does not matter.
        is_decode_runner: whether decode steps run here (they may run beside prefill steps).
        max_prefill_tokens: maximum number of prompt tokens in a step; workspace for them is kept free.
        weights_of: a runner to copy the weights from, instead of reading them.
        push_to: a runner into whose pool prefill steps push the blocks that they hand over; of the same spec.
        share_limit_s: seconds that a step may wait for a layer's KV of another runner that computes the same prompts;
            None for a runner that shares none.
        pipeline: how decode steps use SM partitions, None for plain decode.
        ranks: all ranks that compute the model together; each makes its runner at the same time.
        workers: the other ranks, on rank 0.

    Attributes:
        model: the weights.
        kv_pool: [num_kv_blocks + 1, num_layers, 2, num_kv_heads, block_size, head_dim]; the last block pads steps.
        prefill, decode, mixed: what runs steps of prompts alone, of decode rows alone, and of both.
        packer: packs steps into tasks.
        arrivals: what has arrived in the pool of another runner's chunks; None if prompts are not shared.
        clock: times steps and copies, for a trace; None if there is none.

    Raises:
        GreenContextError: the SMs can be split, but not as `pipeline` asks.
        ModelLoadError: the weights cannot be loaded or do not fit.
        OutOfKVCacheError: the KV pool does not fit.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        device: Device,
        *,
        is_decode_runner: bool,
        max_prefill_tokens: int,
        weights_of: ModelRunner | None = None,
        push_to: ModelRunner | None = None,
        share_limit_s: float | None = None,
        pipeline: PipelineOptions | None = None,
        ranks: Ranks | None = None,
        workers: WorkerGroup | None = None,
    ) -> None:
        self.spec = spec
        self.device = device
        self.is_decode_runner = is_decode_runner
        self.max_prefill_tokens = max_prefill_tokens
        self.clock = DeviceClock(device)
        self._ranks = OneRank() if ranks is None else ranks
        self._workers = NoWorkers() if workers is None else workers
        with device.current():
            self.stream = torch.cuda.Stream(device.index) if device.is_cuda else None
            # High priority: thread blocks of a push get free SMs before the waiting thread blocks of the layer.
            self.copy_stream = torch.cuda.Stream(device.index, priority=-1) if device.is_cuda else None
            # Where flags of the other runner's layers are waited for; no block of a layer delays that either.
            self._wait_stream = torch.cuda.Stream(device.index, priority=-1) if device.is_cuda else None
        with self.on(self.stream):
            their_model = None if weights_of is None else weights_of.model
            self.model: CausalLM = load_model(spec, device, self._ranks, their_model)
            # All ranks meet here, since a collective would time out if one of them loads longer.
            self._ranks.all_reduce_min(0)
            forward = ForwardPass(device, spec, self._ranks, self.model)
            if spec.model_config.has_fp8_kv and weights_of is None:
                if spec.model_config.has_kv_scales:
                    check_kv_scales(self.model)
                else:
                    calibrate_kv_scales(forward)
            # Before the pool is sized, since lanes and logits take memory.
            if spec.uses_graphs(device):
                forward.share_logits(MAX_CHUNKS + (spec.max_num_seqs if is_decode_runner else 0))
            paths = self._make_decode_paths(pipeline) if is_decode_runner else None
            self.num_kv_blocks = self._num_kv_blocks(forward)
            # The last block is the padding block.
            self.kv_pool: torch.Tensor = make_kv_pool(spec, device, self.num_kv_blocks + 1)
            self.arrivals = (
                None
                if share_limit_s is None
                else LayerArrivals(device, spec.model_config.num_hidden_layers, share_limit_s)
            )
            push = NoPush() if push_to is None else PushToPool(push_to.kv_pool, self.copy_stream)
            if push_to is not None and device.is_cuda:
                enable_peer_access(device, push_to.device)
            self.decode = NoDecode(device) if paths is None else DecodeExecutor(forward, self.kv_pool, paths)
            self.prefill = PrefillExecutor(
                forward,
                self.kv_pool,
                max_prefill_tokens,
                push,
                max_num_rows=self.decode.max_num_rows,
                shares_prompts=self.arrivals is not None,
            )
            self.mixed = (
                MixedExecutor(forward, self.kv_pool, self.prefill, self.decode)
                if isinstance(self.decode, DecodeExecutor)
                else NoMixedSteps(device)
            )
            self._graph_pool: Any = None
            self._capture()
            self.packer = self._make_packer()
        self.synchronize()  # other streams are about to read the weights and write to the pool

    @property
    def block_size(self) -> int:
        return self.spec.attention.block_size

    # Steps

    def prepare(self, step: Step) -> None:
        """Does the part of `launch` that needs no device, ahead of it, for the step that is launched next."""
        self.packer.prepare(step)

    def launch(self, step: Step) -> StepHandle:
        """Launches a step, here and on the other ranks; does not wait for the device."""
        with self.on(self.stream):
            began = self.clock.record_moment()
            task = self.packer.pack(step)
            with self._workers.dispatch(task):
                report = None
                if self.arrivals is not None and task.prefill is not None and task.prefill.report is not None:
                    report = functools.partial(self.arrivals.report, task.prefill.report)
                handle = StepHandle(self.device, self.stream, self._run(task), began, report)
            self.packer.launched(step)
            return handle

    def launch_task(self, task: StepTask) -> StepHandle:
        """Launches a step that another process has packed; does not wait for the device."""
        with self.on(self.stream):
            return StepHandle(self.device, self.stream, self._run(task), self.clock.record_moment())

    def run(self, task: StepTask) -> None:
        """Runs this rank's share of a step, made by rank 0. All ranks sample the same tokens; rank 0 returns them."""
        with self.on(self.stream):
            for _ in self._run(task):
                pass

    def _run(self, task: StepTask) -> abc.Iterator[SampledTokens | None]:
        """The prompt tokens to report, what the chunks sample and what the decode rows sample, on the device.

        Each may overwrite the one before.
        """
        if task.prefill is not None and task.decode is not None:
            yield from self.mixed.run(task.prefill, task.decode)
            return
        in_prompts, after_chunks = (None, None) if task.prefill is None else self.prefill.run(task.prefill)
        if after_chunks is not None:
            self.decode.keep_tokens(after_chunks.token_ids)
        yield in_prompts
        yield after_chunks
        yield None if task.decode is None else self.decode.run(task.decode)

    def run_decode_core(self, size: int, arrangement: Arrangement | None = None) -> StepOutput:
        """One decode step over the first `size` rows of the batch, on the device alone: no host value is read.

        It runs on the pipeline in the given arrangement, or plain for None.
        """
        return self.decode.run_core(size, arrangement)

    def forget_device_batch(self) -> None:
        """Discards the batch on the device, which a step that failed to launch may have left in any state."""
        self.packer.forget()

    def take_lane_times(self) -> None:
        """Reads the lane times of timed decode steps that have ended, for metrics and the trace."""
        with self.on(self.stream):
            self.decode.take_lane_times()

    def get_pipeline_statistics(self) -> dict[str, Any]:
        """What the decode pipeline has done since the start; times of its lanes only with `decode_pipeline_profiling`.

        Waits for the device if the lanes are timed.
        """
        with self.on(self.stream):
            return self.decode.paths.get_statistics()

    def print_pipeline_statistics(self) -> None:
        """Prints `get_pipeline_statistics` as a table."""
        print("\n".join(lines(self.get_pipeline_statistics(), str(self.device))))  # noqa: T201 - what it is for

    # Prompts that two runners compute

    def share_prompts_with(self, other: ModelRunner) -> None:
        """Prepares for KV that crosses between this runner and another one, within steps; both call it, once.

        From then on a step pushes the KV of each layer into the other's pool, of prompts whose chunks the two compute
        in turns and of those that decode there. It waits for the KV of the layer that the other one pushes of a chunk
        before its own, and only for steps that were launched before it.
        """
        assert self.arrivals is not None, "this runner was made to share prompts"
        assert other.arrivals is not None, "the other runner was made to share prompts"
        with self.on(self.stream):
            if self.device.is_cuda:
                enable_peer_access(self.device, other.device)
            push = PushToPool(other.kv_pool, self.copy_stream)
            exchange = LayerExchange(self.arrivals, other.arrivals, push, self._wait_stream)
            self.prefill.share(exchange, self._graph_pool)
            if self._graph_pool is not None:
                self.mixed.capture_exchange(self._graph_pool)
        self.synchronize()

    # Copies of KV blocks

    def sync_kv_cache_to(
        self, other: ModelRunner, pairs: abc.Sequence[BlockPair], *, method: str = "copy", after: Event | None = None
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
        for block, target_block in pairs:
            if not (0 <= block < self.num_kv_blocks and 0 <= target_block < other.num_kv_blocks):
                raise HandoffError(
                    f"blocks ({block}, {target_block}) do not exist; the pools have {self.num_kv_blocks} and "
                    f"{other.num_kv_blocks} blocks"
                )
        with other.on(other.copy_stream), self.on(self.copy_stream):
            wait_event(self.copy_stream, after)
            try:
                COPY_METHODS[method](self, other, pairs)
            except BaseException:
                # No handle will exist for copies that were launched: they must not write later.
                self.synchronize()
                other.synchronize()
                raise
            return (self if method == "push" else other).record_copy_event()

    def record_copy_event(self) -> Event:
        """An event that is done when all copies launched on this device so far have ended."""
        with self.on(self.copy_stream):
            return self.device.record_event()

    def record_copy_moment(self, after: Event | None = None) -> Moment:
        """The moment when all copies launched so far, and `after`, are done."""
        with self.on(self.copy_stream):
            wait_event(self.copy_stream, after)
            return self.clock.record_moment()

    def wait_for(self, event: Event) -> None:
        """Makes all steps that are launched here from now on run after `event`, of any device."""
        wait_event(self.stream, event)

    def checksum_blocks(self, blocks: abc.Sequence[int], after: Event) -> torch.Tensor:
        """A checksum of each layer of each block, [N, num_layers] int64 on the host, computed after `after`; waits.

        It changes with any word of the block.
        """
        with self.on(self.copy_stream):
            wait_event(self.copy_stream, after)
            return torch.stack([checksum_layers(self.kv_pool[block]) for block in blocks]).cpu()

    def synchronize(self, *, copies: bool = True) -> None:
        """Waits for all steps, and copies, that were launched here.

        Raises:
            DeviceError: the work does not end within `step_timeout_s`.
        """
        step_timeout_s = self.spec.step_timeout_s
        deadline_s = time.monotonic() + step_timeout_s
        # A step that failed midway may have left a wait that no other stream waits for.
        for stream in (self._wait_stream, self.stream, self.copy_stream if copies else None):
            # Polls, since Python handles no interrupt inside a driver call.
            while stream is not None and not stream.query():
                if time.monotonic() > deadline_s:
                    late = DeviceError(f"{self.device} is lost: its work has not ended within {step_timeout_s=}")
                    raise self._workers.diagnose(late)
                self._workers.check()
                time.sleep(0)
        self._workers.check()  # collectives with a rank that is gone were ended

    # Other ranks, and the end

    def check_workers(self) -> None:
        """Raises WorkerError if another rank is gone."""
        self._workers.check()

    def diagnose(self, error: DeviceError) -> BaseException:
        """The cause of a step on this device that does not end: with tensor parallelism, perhaps another rank."""
        return self._workers.diagnose(error)

    def close_workers(self) -> None:
        """Ends the other ranks."""
        self._workers.close()

    def close(self) -> None:
        """Frees weights and pool, which nothing may be using; the runner cannot be used afterwards."""
        with self.on(self.stream):
            self.decode.close()
            for name in (
                "model",
                "kv_pool",
                "prefill",
                "mixed",
            ):  # an interrupt may strike in between, and `close` be called again
                vars(self).pop(name, None)
            self._ranks.close()
            if self.device.is_cuda:
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream | None) -> abc.Iterator[None]:
        """Makes this device and a stream of it (None on a CPU) current, in inference mode, without autocast."""
        on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        kind = self.device.kind
        as_written = (
            torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        )
        with torch.inference_mode(), as_written, self.device.current(), on_stream:
            yield

    # At the start

    def _make_decode_paths(self, pipeline: PipelineOptions | None) -> DecodePaths:
        wait_for_steps = functools.partial(self.synchronize, copies=False)
        return DecodePaths(self.device, self.spec, self.model, wait_for_steps, pipeline)

    def _make_packer(self) -> TaskPacker:
        return TaskPacker(
            self.prefill.layout,
            self.decode.rows.table if self.is_decode_runner else None,
            self.spec.model_config.vocab_size,
            prefill_sizes=self.prefill.sizes,
            mixed_sizes=self.mixed.sizes,
            new_report=None if self.arrivals is None else self.arrivals.new_report,
        )

    def _num_kv_blocks(self, forward: ForwardPass) -> int:
        spec = self.spec
        most_rows = max(spec.max_num_seqs if self.is_decode_runner else 1, MAX_CHUNKS)
        most_tokens = self.max_prefill_tokens
        if self.is_decode_runner:
            most_tokens += spec.max_num_seqs

        def run_step(kv_pool: torch.Tensor, num_tokens: int) -> None:
            largest = largest_step(
                self.device.torch_device,
                num_tokens=num_tokens,
                num_rows=min(most_rows, num_tokens),
                block_size=self.block_size,
                max_model_len=spec.max_model_len,
                vocab_size=spec.model_config.vocab_size,
            )
            hidden, _ = forward.run(largest, kv_pool)
            rows = np.arange(num_tokens)
            prompt_logprobs(hidden, PromptRows(rows, np.zeros_like(rows), MAX_LOGPROBS), forward)

        return num_kv_blocks(spec, self.device, self._ranks, most_tokens, run_step)

    def _capture(self) -> None:
        """Captures graphs, if steps run from them, and makes what decode steps need."""
        if self.spec.uses_graphs(self.device):
            self._graph_pool = torch.cuda.graph_pool_handle()  # the memory that all graphs share
            self.prefill.capture(self._graph_pool)
            self.mixed.capture(self._graph_pool)
        else:
            logger.info("%s: no graphs, the %s backend runs eagerly", self.device, self.spec.attention.backend.name)
        self.decode.prepare(self._graph_pool)
