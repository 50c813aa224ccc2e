"""Runs the decode part of steps: a token for each row of the batch that lives on the device."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from nanovllm.engine.execution.cuda_graph import StepOutput
from nanovllm.engine.execution.decode_paths import DecodePaths
from nanovllm.engine.execution.device_decode_batch import DeviceDecodeBatch
from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.execution.tasks import DecodeTask
from nanovllm.engine.execution.token_counts import TokenCounts
from nanovllm.engine.scheduling.pipeline_plan import Arrangement
from nanovllm.layers.sampler import SampledTokens
from nanovllm.utils.device import Device


class DecodeExecutor:
    """Decode on one device.

    Args:
        forward: the model.
        kv_pool: where KV is stored; its last block pads batches.
        paths: the ways in which steps can run; `prepare` makes their steps.
    """

    def __init__(self, forward: ForwardPass, kv_pool: torch.Tensor, paths: DecodePaths) -> None:
        self._forward = forward
        self._kv_pool = kv_pool
        self.paths = paths
        spec, num_blocks = forward.spec, len(kv_pool) - 1
        self.rows = DeviceDecodeBatch(
            forward.device,
            spec.attention.backend,
            min(spec.max_num_seqs, num_blocks),  # a decoding request has a block to itself, the one it writes to
            spec.max_model_len,
            spec.attention.block_size,
            num_blocks,
        )
        vocab_size = spec.model_config.vocab_size
        self._counts = TokenCounts(forward.device, self.rows.max_num_rows, vocab_size, forward.ranks)

    @property
    def max_num_rows(self) -> int:
        return self.rows.max_num_rows

    def prepare(self, graph_pool: Any) -> None:
        """Calibrates the pipeline, if there is one, and makes the steps that will be needed."""
        self.paths.prepare(self.rows, self.run_core, graph_pool)

    def run(self, task: DecodeTask) -> SampledTokens:
        """Runs a task; [num_rows] sampled tokens."""
        self.apply(task)
        return self.finish(self.paths.replay(task.num_rows, task.mean_context), task)

    def apply(self, task: DecodeTask) -> None:
        """Makes the batch on the device that of the task."""
        self.rows.apply(task.changes)
        if task.changes.counted is not None:
            self._counts.set(task.changes.counted)

    def finish(self, output: StepOutput, task: DecodeTask) -> SampledTokens:
        """The tokens of the rows, which come first in the output of the task's step, by all sampling parameters."""
        if task.sampling is None:
            return self._forward.sampled_tokens(output, task.num_rows, None)
        if task.sampling.penalties is None:
            sampled = self._forward.sampled_tokens(output, task.num_rows, task.sampling)
        else:
            rows = self.rows.first(task.num_rows)
            sampled = self._forward.sampled_tokens(output, task.num_rows, task.sampling, self._counts.tensor, rows)
            self._counts.add(rows, sampled.token_ids)
        self.rows.correct(sampled.token_ids)
        return sampled

    def keep_tokens(self, token_ids: torch.Tensor) -> None:
        """Keeps the first tokens of these requests for the next step."""
        self.rows.keep_tokens(token_ids)

    def run_core(self, size: int, arrangement: Arrangement | None = None) -> StepOutput:
        """One step over the first `size` rows of the batch, on the device alone: no host value is read.

        It runs on the pipeline in the given arrangement, or plain for None.
        """
        inputs, lane_moments = self.rows.gather(size), None
        if arrangement is not None:
            pipeline = self.paths.pipeline
            assert pipeline is not None, "an arrangement is of a pipeline"
            hidden = pipeline.decode_token(
                inputs.input_ids, inputs.positions, self._kv_pool, inputs.metadata, arrangement
            )
            lane_moments = pipeline.clock.last
        else:
            hidden = self._forward.hidden_states(inputs.input_ids, inputs.positions, inputs.metadata, self._kv_pool)
        output = self._forward.sample(hidden, inputs.sampling)
        self.rows.advance(inputs, output.sampled.token_ids)
        return StepOutput(output.logits, output.sampled, lane_moments)

    def take_lane_times(self) -> None:
        """Reads the lane times of timed steps that have ended."""
        self.paths.take_times()

    def close(self) -> None:
        """Gives all graphs and lanes back; statistics of the paths stay."""
        self.paths.close()
        for name in ("_forward", "_kv_pool", "_counts", "rows"):
            vars(self).pop(name, None)


class NoDecode:
    """Stands in where a runner only prefills: there is nothing to prepare or close, and no step to run."""

    max_num_rows = 0

    def __init__(self, device: Device) -> None:
        self._device = device

    @property
    def paths(self) -> DecodePaths:
        self._refuse()

    @property
    def rows(self) -> DeviceDecodeBatch:
        self._refuse()

    def prepare(self, graph_pool: Any) -> None: ...

    def run(self, task: DecodeTask) -> SampledTokens:
        self._refuse()

    def run_core(self, size: int, arrangement: Arrangement | None = None) -> StepOutput:
        self._refuse()

    def keep_tokens(self, token_ids: torch.Tensor) -> None: ...

    def take_lane_times(self) -> None: ...

    def close(self) -> None: ...

    def _refuse(self) -> NoReturn:
        raise AssertionError(f"{self._device} was made for prefill, it does not decode")
