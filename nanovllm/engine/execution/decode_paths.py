"""How decode steps run on one device: plain, or on two lanes, arranged in one of several ways.

Measures what that costs, makes what will be needed, lets the rebalancer choose while steps run, and falls back to what
works. Knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

from nanovllm.engine.execution.cuda_graph import EagerSteps, StepGraphs, StepOutput, batch_buckets, bucket_for
from nanovllm.engine.execution.device_decode_batch import DeviceDecodeBatch
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
from nanovllm.engine.scheduling.calibration import Calibration, Measured, keep_calibration, load_calibration
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut, Split
from nanovllm.engine.scheduling.rebalancer import Rebalancer, StepTimes
from nanovllm.errors import BackendUnavailableError, ConfigError, GreenContextError
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.device import Device, DeviceClock, Stopwatch, driver_version
from nanovllm.version import __version__

logger = logging.getLogger(__name__)

CALIBRATED_BATCHES = (256, 512, 768, 1024, 1536, 2048)
CALIBRATED_CONTEXTS = (128, 256, 384, 512, 768, 1024, 2048)
CALIBRATED_ATTENTION_SM = (28, 32, 36, 56, 64)
CALIBRATED_CUTS = (Cut.GEMMS, Cut.REST)
"""What the decode pipeline is timed for. Smaller batches it has never been worth."""
NUM_TIMED_STEPS = 4
HEATING_S = 0.4
"""Seconds that a GPU's clocks take to come down to what its power allows."""
DECIDE_EVERY = 8
"""Steps between two decisions; the first of them is timed."""


@dataclass(frozen=True)
class PipelineOptions:
    """How a decode device's SMs are split, None where that is to be chosen; how many micro-batches take turns; whether
    every step's lanes are timed; and whether the pipeline runs only where it is faster than plain decode."""

    attention_sm: int | None = None
    ffn_sm: int | None = None
    num_micro_batches: int = 2
    profiling: bool = False
    adaptive: bool = False

    @property
    def has_split(self) -> bool:
        """Whether the split was given, or half of it."""
        return self.attention_sm is not None or self.ffn_sm is not None


@dataclass(frozen=True)
class _TimedStep:
    """A step that was launched, and the copies of its lanes' moments that are on the way to the host."""

    size: int
    context: float
    arrangement: Arrangement | None
    stopwatch: Stopwatch
    lanes: LaneMoments | None
    moments: torch.Tensor | None
    anchor: Anchor | None


class DecodeCore(Protocol):
    """What decode steps are made of, on one device; see `ModelRunner`."""

    device: Device
    model: CausalLM
    clock: DeviceClock | None
    decode_rows: DeviceDecodeBatch | None
    graph_pool: Any
    spec: Any

    @property
    def uses_graphs(self) -> bool: ...

    def run_decode_core(self, size: int, arrangement: Arrangement | None = None) -> StepOutput: ...

    def synchronize(self, *, copies: bool = True) -> None: ...


class DecodePaths:
    """The ways in which a runner's decode steps can run.

    Made before the runner's KV pool, since lanes take memory; `prepare` makes the rest once there is one.

    Args:
        runner: whose steps.
        options: how steps use SM partitions, None for plain decode.

    Raises:
        GreenContextError: the SMs can be split, but not as `options` has it.
    """

    def __init__(self, runner: DecodeCore, options: PipelineOptions | None) -> None:
        self._runner = runner
        self._options = options
        self._profiles = options is not None and options.profiling
        self.device = runner.device
        self.counters = PipelineCounters()
        self.pipeline: PipelineScheduler | None = None
        if options is not None:
            self.pipeline = self._make_pipeline(options)
        self.calibration = Calibration()
        self.rebalancer: Rebalancer | None = None
        self.sizes: list[int] = []
        self.steps: dict[Arrangement | None, StepGraphs | EagerSteps] = {}
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
        """Is told when lanes were busy in the steps that are timed."""

    def prepare(self) -> None:
        """Measures, or reads what was measured before, and makes all steps that will be needed."""
        rows = self._runner.decode_rows
        assert rows is not None, f"{self.device} was made for prefill"
        # Without graphs nothing is padded.
        most_rows = rows.max_num_rows
        self.sizes = batch_buckets(most_rows) if self._runner.uses_graphs else list(range(1, most_rows + 1))
        if self.pipeline is not None and self._options is not None:
            try:
                self._prepare_pipeline(self._options)
            except (RuntimeError, BackendUnavailableError) as error:  # a capture that the driver refuses, say
                self.steps, self.rebalancer = {}, None
                traceback.clear_frames(error.__traceback__)  # they hold graphs over lanes that are about to go
                self._fall_back(str(error))
        self.steps[None] = self._make_steps(self.sizes, None)

    def replay(self, num_rows: int, positions: np.ndarray | None) -> StepOutput:
        """One decode step of the first rows of the batch, by what is chosen now for their [B] int64 positions.

        If that fails, by what has worked before, in the end plain.
        """
        size = bucket_for(self.sizes, num_rows)
        if self.rebalancer is None:
            return self.steps[None].replay(size)
        assert positions is not None, "what chooses knows the contexts"
        self._steps_to_decision -= 1
        is_timed = size != self._size or self._steps_to_decision <= 0
        if not is_timed:
            output, arrangement = self._run(size, self._chosen)
        else:
            self.take_times()
            context = float(positions.mean()) + 1
            wanted = self._decide(self.rebalancer, size, context)
            stopwatch = Stopwatch(self.device)
            clock = self._runner.clock
            anchor = None if clock is None or wanted is None else Anchor(clock, self.device)
            output, arrangement = self._run(size, wanted)
            stopwatch.stop()
            if arrangement == wanted:  # else it has taken the time of what failed, too
                lanes = output.lane_moments
                moments = None if lanes is None else lanes.moments.to("cpu", non_blocking=True)
                self._timed.append(_TimedStep(size, context, arrangement, stopwatch, lanes, moments, anchor))
        if arrangement is not None:
            self.counters.steps += 1
            self.counters.tokens += num_rows
        return output

    @property
    def current(self) -> Arrangement | None:
        """How the last steps ran, None if plain."""
        return self._chosen

    @property
    def num_rebalances(self) -> int:
        pipeline = self.pipeline
        return 0 if pipeline is None else pipeline.green_manager.stats()["rebalances"]

    def force(self, arrangement: Arrangement | None) -> None:
        """Runs steps so (None: plain), whatever the rebalancer would choose, as far as they can; for tests.

        Raises:
            ConfigError: no step was made for it.
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
                self._runner.synchronize(copies=False)
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
        """A step, and how it ran. One that fails has changed nothing that another would not write anew."""
        for arrangement in dict.fromkeys((wanted, self._last_good, None)):
            if arrangement is None:
                break
            if not self._has(arrangement, size):
                continue
            try:
                if arrangement == self._chosen:  # else it is tried for a step
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
        """Makes the split the current one. Its lanes were made with its steps, so nothing waits for that."""
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
        """Takes in times of the steps that have ended; waits for none."""
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
        """None, with a line in the log, where SMs cannot be split: decode is plain then.

        Raises:
            GreenContextError: they can be, but not as the options have it.
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
        return PipelineScheduler(self._runner.model, manager, options.profiling, num_micro_batches=parts)

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
        always = self._calibrate(options)
        bests = {size: self.calibration.best_for(size) for size in self.sizes}
        ready = bests if always is None else {size: [always] for size in self.sizes}
        for arrangement in {one for of_size in ready.values() for one in of_size}:
            sizes = [size for size in self.sizes if arrangement in ready[size]]
            self.steps[arrangement] = self._make_steps(sizes, arrangement)
            if not self._runner.uses_graphs:
                self._try(self.steps[arrangement])
        if always is not None or self.steps:
            self.rebalancer = Rebalancer(self.calibration, ready, always)

    def _make_steps(self, sizes: list[int], arrangement: Arrangement | None) -> StepGraphs | EagerSteps:
        runner = self._runner
        assert runner.decode_rows is not None, f"{self.device} was made for prefill"
        step = functools.partial(runner.run_decode_core, arrangement=arrangement)
        if not runner.uses_graphs:
            return EagerSteps(step)
        runner.decode_rows.pad(runner.decode_rows.max_num_rows)
        if arrangement is None:
            return StepGraphs("decode", step, sizes, runner.graph_pool)
        # Memory of their own: a capture that fails leaves its pool of no use.
        pool = torch.cuda.graph_pool_handle()
        return StepGraphs(f"decode {arrangement}", step, sizes, pool, warm_all=True)

    def _try(self, steps: StepGraphs | EagerSteps) -> None:
        """Runs the largest step once: what cannot run is to be known at the start."""
        rows = self._runner.decode_rows
        assert rows is not None, f"{self.device} was made for prefill"
        rows.pad(rows.max_num_rows)
        steps.replay(rows.max_num_rows)
        self._runner.synchronize(copies=False)

    def _calibrate(self, options: PipelineOptions) -> Arrangement | None:
        """Times plain decode and the pipeline, arranged in several ways, where there is something to choose or show.

        Returns how the pipeline is always arranged, None if that is to be chosen.
        """
        assert self.pipeline is not None, "there is a pipeline to be timed"
        given = Arrangement(self.pipeline.green_manager.split, self.pipeline.cut)
        largest = self.sizes[-1]
        batches = [batch for batch in CALIBRATED_BATCHES if batch <= largest]
        if options.adaptive:
            candidates = self._candidates(options) if batches else []
            if candidates:
                self.calibration = self._calibrated(candidates, batches)
            else:
                logger.info("%s: decode is plain: lanes are for GPUs and batches of some hundred requests", self.device)
            return None
        if not self.device.is_cuda or (options.has_split and not options.profiling):
            return given
        if options.has_split:
            self.calibration = self._calibrated([given], batches or [largest])
            return given
        self.calibration = self._calibrated(self._candidates(options), [largest])
        return self.calibration.best_of_all() if self.calibration.points else given

    def _candidates(self, options: PipelineOptions) -> list[Arrangement]:
        """How the pipeline may be arranged, as far as the driver grants it; the split may have been given.

        Not at all on a CPU, whose lanes are there to check the order of a plan.
        """
        assert self.pipeline is not None, "there is a pipeline to be arranged"
        manager = self.pipeline.green_manager
        if not manager.num_sms:
            return []
        splits = [manager.split]
        if not options.has_split:
            splits = [(sms, manager.num_sms - sms) for sms in CALIBRATED_ATTENTION_SM if sms < manager.num_sms]
        granted = [split for split in splits if self._is_granted(split)]
        if not granted:
            raise GreenContextError(f"{self.device} grants none of {splits}; give decode_attention_sm")
        return [Arrangement(split, cut) for split in granted for cut in CALIBRATED_CUTS]

    def _is_granted(self, split: Split) -> bool:
        assert self.pipeline is not None, "there is a pipeline to be arranged"
        try:
            self.pipeline.green_manager.allocate(split)
        except GreenContextError as error:
            logger.info("%s: not timed: %s", self.device, error)
            return False
        return True

    def _calibrated(self, arrangements: list[Arrangement], batches: list[int]) -> Calibration:
        """What an engine before this one measured, or what is measured now."""
        # Each of the steps that are timed moves on by a token.
        longest = self._runner.spec.max_model_len - NUM_TIMED_STEPS
        if longest < 1:
            return Calibration()
        contexts = [context for context in CALIBRATED_CONTEXTS if context <= longest] or [longest]
        about = self._about(arrangements, batches, contexts)
        calibration = load_calibration(about)
        if calibration is None:
            calibration = Calibration(self._measured(arrangements, batches, contexts))
            keep_calibration(about, calibration)
        for point in calibration.points:
            logger.info("%s: %s", self.device, point)
        return calibration

    def _about(self, arrangements: list[Arrangement], batches: list[int], contexts: list[int]) -> dict[str, Any]:
        """Cache key: a calibration is valid only for this GPU, driver, model and set of options."""
        spec, pipeline = self._runner.spec, self.pipeline
        assert pipeline is not None, "there is a pipeline to be timed"
        gpu = torch.cuda.get_device_name(self.device.index) if self.device.is_cuda else "cpu"
        return {
            "gpu": gpu,
            "num_sms": pipeline.green_manager.num_sms,
            "driver": driver_version(),
            "nanovllm": __version__,
            "torch": torch.__version__,
            "model": repr(dataclasses.asdict(spec.model_config)),
            "dtype": str(spec.dtype),
            "attention_backend": spec.attention.backend.name,
            "kvcache_block_size": spec.attention.block_size,
            "max_model_len": spec.max_model_len,
            "enforce_eager": spec.enforce_eager,
            "micro_batches": pipeline.num_micro_batches,
            "profiling": self._profiles,
            "batches": batches,
            "contexts": contexts,
            "arrangements": [str(arrangement) for arrangement in arrangements],
        }

    def _measured(self, arrangements: list[Arrangement], batches: list[int], contexts: list[int]) -> list[Measured]:
        rows = self._runner.decode_rows
        assert rows is not None, f"{self.device} was made for prefill"
        paths = {arrangement: self._make_steps(batches, arrangement) for arrangement in (None, *arrangements)}
        self._heat(functools.partial(paths[None].replay, batches[-1]))
        points = []
        for batch, context in itertools.product(batches, contexts):
            seconds = {}
            for arrangement, steps in paths.items():
                rows.pretend(batch, context)
                seconds[arrangement] = self._time(functools.partial(steps.replay, batch))
            pipelined_s = {arrangement: seconds[arrangement] for arrangement in arrangements}
            points.append(Measured(batch, context, seconds[None], pipelined_s))
        rows.forget()
        return points

    def _heat(self, run: Callable[[], object]) -> None:
        """Keeps the GPU busy until it runs at the clocks that it will run at."""
        started = time.perf_counter()
        while time.perf_counter() - started < HEATING_S:
            run()
            self._runner.synchronize(copies=False)

    def _time(self, run: Callable[[], object]) -> float:
        """Seconds of a run; the median of some, back to back."""
        stopwatches = []
        for _ in range(NUM_TIMED_STEPS):
            stopwatch = Stopwatch(self.device)
            run()
            stopwatch.stop()
            stopwatches.append(stopwatch)
        self._runner.synchronize(copies=False)
        return median(stopwatch.seconds() for stopwatch in stopwatches)
