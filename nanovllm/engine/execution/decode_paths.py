"""How decode steps run on one device: plain, or on two lanes in one of several arrangements.

Makes the steps of all arrangements that may be needed, lets the rebalancer choose one while they run, and falls back
to what works. `DecodeCalibrator` measures what each costs. Knows nothing of requests.
"""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nanovllm.engine.execution.cuda_graph import EagerSteps, StepGraphs, StepOutput, batch_buckets, bucket_for
from nanovllm.engine.execution.decode_calibrator import DecodeCalibrator, Steps
from nanovllm.engine.execution.device_decode_batch import DeviceDecodeBatch
from nanovllm.engine.execution.runner_spec import PipelineOptions, RunnerSpec
from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.observability.pipeline_statistics import (
    Anchor,
    LaneMoments,
    LaneTimes,
    MeanLaneTimes,
    PipelineCounters,
    statistics,
)
from nanovllm.engine.observability.trace import Tracer
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.scheduling.calibration import Calibration
from nanovllm.engine.scheduling.pipeline_plan import Arrangement
from nanovllm.engine.scheduling.rebalancer import Rebalancer, StepTimes
from nanovllm.errors import BackendUnavailableError, ConfigError, GreenContextError
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.device import Device, DeviceClock, Stopwatch

logger = logging.getLogger(__name__)

DECIDE_EVERY = 8
"""Steps from one decision to the next; the first of them is timed."""


@dataclass(frozen=True)
class _TimedStep:
    """A launched step that is timed; its lanes' moments are on the way to the host."""

    size: int
    context: float
    arrangement: Arrangement | None
    stopwatch: Stopwatch
    lanes: LaneMoments | None
    moments: torch.Tensor | None
    anchor: Anchor | None


class NoPaths:
    """Stands in where decode steps run in another process: nothing is known here of how."""

    num_rebalances = 0
    lane_times: LaneTimes | None = None
    current: Arrangement | None = None

    def __init__(self) -> None:
        self.counters = PipelineCounters()


class RunStep(Protocol):
    """One decode step over the first rows of the batch, on the device alone; see `DecodeExecutor.run_core`."""

    def __call__(self, size: int, arrangement: Arrangement | None = None) -> StepOutput: ...


class DecodePaths:
    """The ways in which a runner's decode steps can run.

    Made before the runner's KV pool, since lanes take memory; `prepare` makes the rest once there is one.

    Args:
        device: where they run.
        spec: sizes of the model.
        model: the model.
        synchronize: waits for all steps that were launched on the device.
        options: how steps use SM partitions, None for plain decode.

    Raises:
        GreenContextError: the SMs can be split, but not as `options` asks.
    """

    def __init__(
        self,
        device: Device,
        spec: RunnerSpec,
        model: CausalLM,
        synchronize: Callable[[], None],
        options: PipelineOptions | None,
    ) -> None:
        self.device = device
        self._spec = spec
        self._model = model
        self._synchronize = synchronize
        self._options = options
        self._profiles = options is not None and options.profiling
        self._uses_graphs = spec.uses_graphs(device)
        self.counters = PipelineCounters()
        self.pipeline: PipelineScheduler | None = None
        if options is not None:
            self.pipeline = self._make_pipeline(options)
        self.calibration = Calibration()
        self.rebalancer: Rebalancer | None = None
        self.sizes: list[int] = []
        self.steps: dict[Arrangement | None, Steps] = {}
        self.lane_times: LaneTimes | None = None
        """Lane times of the last step on lanes that was timed."""
        self._mean_times = MeanLaneTimes()
        self._mean_context = 0.0
        self._num_contexts = 0
        self._size = 0
        self._steps_to_decision = 0
        self._chosen: Arrangement | None = None
        self._forced: tuple[Arrangement | None] | None = None
        self._last_good: Arrangement | None = None
        self._timed: deque[_TimedStep] = deque()
        self.tracer: Tracer | None = None
        """Receives spans of the lanes for each timed step; None without a trace."""
        self.clock: DeviceClock | None = None
        """Converts the lanes' moments to the tracer's time."""

    def prepare(self, rows: DeviceDecodeBatch, run_step: RunStep, graph_pool: Any) -> None:
        """Calibrates the pipeline, if there is one, and makes all steps that will be needed.

        Args:
            rows: the batch that steps run over.
            run_step: runs one step, or is captured in a graph.
            graph_pool: memory for the graphs of plain steps; None if there are no graphs.
        """
        self._rows, self._run_step, self._graph_pool = rows, run_step, graph_pool
        # Without graphs nothing is padded.
        most_rows = rows.max_num_rows
        self.sizes = batch_buckets(most_rows) if self._uses_graphs else list(range(1, most_rows + 1))
        if self.pipeline is not None and self._options is not None:
            try:
                self._prepare_pipeline(self._options)
            except (RuntimeError, BackendUnavailableError) as error:  # a capture that the driver refuses, say
                self.steps, self.rebalancer = {}, None
                traceback.clear_frames(
                    error.__traceback__
                )  # its frames hold graphs over lanes that are about to be destroyed
                self._fall_back(str(error))
        self.steps[None] = self._make_steps(self.sizes, None)

    def replay(self, num_rows: int, mean_context: float) -> StepOutput:
        """Runs one decode step of the first `num_rows` rows of the batch.

        The rebalancer chooses the arrangement by bucket and `mean_context`, in tokens. If it fails to launch, the step
        runs in the arrangement that worked last, and if that fails too, plain.
        """
        size = bucket_for(self.sizes, num_rows)
        if self.rebalancer is None:
            return self.steps[None].replay(size)
        self._steps_to_decision -= 1
        is_timed = size != self._size or self._steps_to_decision <= 0
        if not is_timed:
            output, arrangement = self._run(size, self._chosen)
        else:
            self.take_times()
            wanted = self._decide(self.rebalancer, size, mean_context)
            stopwatch = Stopwatch(self.device)
            anchor = None if self.clock is None or wanted is None else Anchor(self.clock, self.device)
            output, arrangement = self._run(size, wanted)
            stopwatch.stop()
            if arrangement == wanted:  # else the time includes the failed attempt
                lanes = output.lane_moments
                moments = None if lanes is None else lanes.moments.to("cpu", non_blocking=True)
                self._timed.append(_TimedStep(size, mean_context, arrangement, stopwatch, lanes, moments, anchor))
        if arrangement is not None:
            self.counters.steps += 1
            self.counters.tokens += num_rows
        return output

    @property
    def current(self) -> Arrangement | None:
        """The arrangement that was chosen last, None for plain decode."""
        return self._chosen

    @property
    def num_rebalances(self) -> int:
        pipeline = self.pipeline
        return 0 if pipeline is None else pipeline.green_manager.stats()["rebalances"]

    def force(self, arrangement: Arrangement | None) -> None:
        """Runs all steps that can in this arrangement (None: plain), not in the rebalancer's choice; for tests.

        Raises:
            ConfigError: no steps were made for it.
        """
        if arrangement not in self.steps:
            raise ConfigError(f"{arrangement} is not ready; there are {', '.join(map(str, self.steps))}")
        self._forced = (arrangement,)
        self._steps_to_decision = 0

    def get_statistics(self) -> dict[str, Any]:
        """What the pipeline has done since the start; times of lanes only with `decode_pipeline_profiling`."""
        counters, sequential_s = self.counters, None
        if self.rebalancer is not None:
            if self._profiles and self._timed:
                self._synchronize()
            self.take_times()
            if counters.steps and self._num_contexts:
                sequential_s = self.calibration.seconds(None, counters.tokens / counters.steps, self._mean_context)
        lanes = self._mean_times.mean() if self._profiles else None
        arrangements = [] if self.rebalancer is None else self.rebalancer.arrangements
        return statistics(counters, arrangements, lanes, sequential_s)

    def close(self) -> None:
        """Gives all graphs and lanes back, which nothing may be using."""
        self.steps.clear()
        self._timed.clear()
        self._close_pipeline()
        for name in ("_model", "_rows", "_run_step", "_graph_pool"):
            vars(self).pop(name, None)

    # While steps run

    def _decide(self, rebalancer: Rebalancer, size: int, context: float) -> Arrangement | None:
        self._size, self._steps_to_decision = size, 1 if self._profiles else DECIDE_EVERY
        if self._forced is not None:
            (forced,) = self._forced
            self._chosen = forced if self._has(forced, size) else None
            return self._chosen
        chosen = rebalancer.choose(size, context, time.monotonic())
        if chosen != self._chosen:
            logger.debug("%s: %d requests of %.0f tokens: %s", self.device, size, context, chosen or "plain")
        self._chosen = chosen
        return rebalancer.trial(size, context)

    def _has(self, arrangement: Arrangement | None, size: int) -> bool:
        steps = self.steps.get(arrangement)
        return steps is not None and (isinstance(steps, EagerSteps) or size in steps.sizes)

    def _run(self, size: int, wanted: Arrangement | None) -> tuple[StepOutput, Arrangement | None]:
        """Runs a step; its output and the arrangement that it ran in. A failed attempt leaves nothing behind."""
        for arrangement in dict.fromkeys((wanted, self._last_good, None)):
            if arrangement is None:
                break
            if not self._has(arrangement, size):
                continue
            try:
                if arrangement == self._chosen:  # else this step is a trial
                    self._rebalance(arrangement)
                output = self.steps[arrangement].replay(size)
            except RuntimeError as error:
                traceback.clear_frames(error.__traceback__)
                self._failed(arrangement, error)
                continue
            self._worked(arrangement)
            return output, arrangement
        return self.steps[None].replay(size), None

    def _rebalance(self, arrangement: Arrangement) -> None:
        """Makes the arrangement's split the current one; its lanes exist already, so this does not wait."""
        assert self.pipeline is not None, "an arrangement is of a pipeline"
        manager = self.pipeline.green_manager
        if manager.split != arrangement.split:
            manager.rebalance(*arrangement.split)

    def _failed(self, arrangement: Arrangement, error: RuntimeError) -> None:
        assert self.rebalancer is not None, "what has failed was chosen"
        cause = "rebalance failed" if isinstance(error, GreenContextError) else "lanes failed"
        self.counters.fallbacks[cause] += 1
        if self._last_good == arrangement:
            self._last_good = None
        if self._chosen == arrangement:
            self._chosen, self._steps_to_decision = None, 0
        if self.rebalancer.failed(arrangement, time.monotonic()):
            logger.warning("%s: %s is left out for a while: %s", self.device, arrangement, error)

    def _worked(self, arrangement: Arrangement) -> None:
        assert self.rebalancer is not None, "what has worked was chosen"
        self._last_good = arrangement
        if self.rebalancer.worked(arrangement):
            self.counters.recoveries += 1
            logger.warning("%s: %s works again", self.device, arrangement)

    def take_times(self) -> None:
        """Gives the rebalancer the times of timed steps that have ended; does not wait."""
        rebalancer = self.rebalancer
        while rebalancer is not None and self._timed and self._timed[0].stopwatch.is_done():
            step = self._timed.popleft()
            times = StepTimes(step.stopwatch.seconds())
            if step.lanes is not None and step.moments is not None:
                self.lane_times = step.lanes.times(step.moments.numpy())
                self._mean_times.add(self.lane_times)
                times = StepTimes(times.step_s, self.lane_times.attention_s, self.lane_times.ffn_s)
                if self.tracer is not None and step.anchor is not None:
                    self._trace_lanes(self.tracer, step.lanes, step.moments.numpy(), step.anchor)
                self._num_contexts += 1
                self._mean_context += (step.context - self._mean_context) / self._num_contexts
            rebalancer.observe(step.size, step.context, step.arrangement, times)

    def _trace_lanes(self, tracer: Tracer, lanes: LaneMoments, moments: np.ndarray, anchor: Anchor) -> None:
        offset_s = anchor.offset_s()
        for step, (begin_ns, end_ns) in zip(lanes.steps, moments.T.tolist(), strict=True):
            row = f"{step.lane.value} lane {self.device}"
            name = f"{step.named_pieces} of micro-batch {step.micro_batch}"
            tracer.add(row, name, begin_ns / 1e9 + offset_s, end_ns / 1e9 + offset_s)

    # At the start

    def _make_pipeline(self, options: PipelineOptions) -> PipelineScheduler | None:
        """The pipeline; None, with a warning, where SMs cannot be split at all.

        Raises:
            GreenContextError: SMs can be split, but not as the options ask.
        """
        try:
            manager = GreenManager(self.device, options.attention_sm, options.ffn_sm, enable_rebalance=True)
            manager.allocate()
        except GreenContextError as error:
            if options.has_split and self._can_split_sms():
                raise
            self._fall_back(str(error))
            return None
        parts = options.num_micro_batches
        return PipelineScheduler(self._model, manager, options.profiling, num_micro_batches=parts)

    def _can_split_sms(self) -> bool:
        try:
            manager = GreenManager(self.device, None, None)
            manager.allocate()
        except GreenContextError:
            return False
        manager.close()
        return True

    def _fall_back(self, reason: str) -> None:
        """Decode is plain for good; nothing may be left that was captured over the pipeline's lanes."""
        logger.warning("%s: no decode pipeline, decode is plain: %s", self.device, reason)
        self.counters.fallbacks[reason] += 1
        self._close_pipeline()

    def _close_pipeline(self) -> None:
        if self.pipeline is None:
            return
        manager, self.pipeline = self.pipeline.green_manager, None
        if self.device.is_cuda:
            torch.cuda.empty_cache()  # memory that was used on a lane's stream is given back while there is the stream
        manager.close()

    def _prepare_pipeline(self, options: PipelineOptions) -> None:
        assert self.pipeline is not None, "there is a pipeline to be timed"
        calibrator = DecodeCalibrator(
            self.device,
            self._spec,
            self.pipeline,
            self._rows,
            self._make_steps,
            self._synchronize,
            profiles=self._profiles,
        )
        self.calibration, always = calibrator.calibrate(options, self.sizes[-1])
        bests = {size: self.calibration.best_for(size) for size in self.sizes}
        ready = bests if always is None else {size: [always] for size in self.sizes}
        for arrangement in {one for of_size in ready.values() for one in of_size}:
            sizes = [size for size in self.sizes if arrangement in ready[size]]
            self.steps[arrangement] = self._make_steps(sizes, arrangement)
            if not self._uses_graphs:
                self._try(self.steps[arrangement])
        if always is not None or self.steps:
            self.rebalancer = Rebalancer(self.calibration, ready, always)

    def _make_steps(self, sizes: list[int], arrangement: Arrangement | None) -> Steps:
        step = functools.partial(self._run_step, arrangement=arrangement)
        if not self._uses_graphs:
            return EagerSteps(step)
        self._rows.pad(self._rows.max_num_rows)
        if arrangement is None:
            return StepGraphs("decode", step, sizes, self._graph_pool)
        # A memory pool of their own: a failed capture makes its pool unusable.
        pool = torch.cuda.graph_pool_handle()
        return StepGraphs(f"decode {arrangement}", step, sizes, pool, warm_all=True)

    def _try(self, steps: Steps) -> None:
        """Runs the largest step once, so that an arrangement that cannot run is found at the start."""
        self._rows.pad(self._rows.max_num_rows)
        steps.replay(self._rows.max_num_rows)
        self._synchronize()
