"""Times plain decode and the pipeline at the start, or reads what an engine before this one measured.

Knows nothing of requests, nor of what is chosen while steps run.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from nanovllm.engine.execution.cuda_graph import EagerSteps, StepGraphs
from nanovllm.engine.execution.device_decode_batch import DeviceDecodeBatch
from nanovllm.engine.execution.fingerprint import fingerprint
from nanovllm.engine.execution.runner_spec import PipelineOptions, RunnerSpec
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.scheduling.calibration import Calibration, Measured, keep_calibration, load_calibration
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut, Split
from nanovllm.errors import GreenContextError
from nanovllm.utils.device import Device, Stopwatch

logger = logging.getLogger(__name__)

CALIBRATED_BATCHES = (256, 512, 768, 1024, 1536, 2048)
CALIBRATED_CONTEXTS = (128, 256, 384, 512, 768, 1024, 2048)
CALIBRATED_ATTENTION_SM = (28, 32, 36, 56, 64)
CALIBRATED_CUTS = (Cut.GEMMS, Cut.REST)
"""What the decode pipeline is timed for; it has never paid for smaller batches."""
NUM_TIMED_STEPS = 4
WARM_UP_S = 0.4
"""Seconds until a GPU's clocks have come down to what its power limit allows."""


Steps = StepGraphs | EagerSteps
MakeSteps = Callable[[list[int], Arrangement | None], Steps]
"""Makes the steps of the given batch sizes in one arrangement, or plain ones for None."""


class DecodeCalibrator:
    """Finds out what decode steps cost on one device, plain and in each arrangement that the driver grants.

    Args:
        device: where they run.
        spec: sizes of the model.
        pipeline: whose arrangements are timed.
        rows: the decode batch, filled with dummy requests meanwhile.
        make_steps: makes the steps to time.
        synchronize: waits for all steps that were launched on the device.
        profiles: whether the lanes of every step are timed.
    """

    def __init__(
        self,
        device: Device,
        spec: RunnerSpec,
        pipeline: PipelineScheduler,
        rows: DeviceDecodeBatch,
        make_steps: MakeSteps,
        synchronize: Callable[[], None],
        *,
        profiles: bool,
    ) -> None:
        self._device = device
        self._spec = spec
        self._pipeline = pipeline
        self._rows = rows
        self._make_steps = make_steps
        self._synchronize = synchronize
        self._profiles = profiles

    def calibrate(self, options: PipelineOptions, largest: int) -> tuple[Calibration, Arrangement | None]:
        """Times batches of up to `largest` requests where there is something to choose or show.

        Returns the calibration, which may be empty, and the one arrangement for all steps, None if the rebalancer is to
        choose among several.
        """
        given = Arrangement(self._pipeline.green_manager.split, self._pipeline.cut)
        batches = [batch for batch in CALIBRATED_BATCHES if batch <= largest]
        if options.adaptive:
            candidates = self._candidates(options) if batches else []
            if candidates:
                return self._calibrated(candidates, batches), None
            logger.info("%s: decode is plain: lanes are for GPUs and batches of some hundred requests", self._device)
            return Calibration(), None
        if not self._device.is_cuda or (options.has_split and not options.profiling):
            return Calibration(), given
        if options.has_split:
            return self._calibrated([given], batches or [largest]), given
        calibration = self._calibrated(self._candidates(options), [largest])
        return calibration, calibration.best_of_all() if calibration.points else given

    def _candidates(self, options: PipelineOptions) -> list[Arrangement]:
        """The arrangements to time: those that the driver grants, with the given split if there is one.

        There are none on a CPU, whose lanes only serve to check the order of a plan.
        """
        manager = self._pipeline.green_manager
        if not manager.num_sms:
            return []
        splits = [manager.split]
        if not options.has_split:
            splits = [(sms, manager.num_sms - sms) for sms in CALIBRATED_ATTENTION_SM if sms < manager.num_sms]
        granted = [split for split in splits if self._is_granted(split)]
        if not granted:
            raise GreenContextError(f"{self._device} grants none of {splits}; give decode_attention_sm")
        return [Arrangement(split, cut) for split in granted for cut in CALIBRATED_CUTS]

    def _is_granted(self, split: Split) -> bool:
        try:
            self._pipeline.green_manager.allocate(split)
        except GreenContextError as error:
            logger.info("%s: not timed: %s", self._device, error)
            return False
        return True

    def _calibrated(self, arrangements: list[Arrangement], batches: list[int]) -> Calibration:
        """The calibration: kept on disk by an earlier engine, or measured now."""
        # Each timed step adds a token to the contexts.
        longest = self._spec.max_model_len - NUM_TIMED_STEPS
        if longest < 1:
            return Calibration()
        contexts = [context for context in CALIBRATED_CONTEXTS if context <= longest] or [longest]
        about = self._fingerprint(arrangements, batches, contexts)
        calibration = load_calibration(about)
        if calibration is None:
            calibration = Calibration(self._measured(arrangements, batches, contexts))
            keep_calibration(about, calibration)
        for point in calibration.points:
            logger.info("%s: %s", self._device, point)
        return calibration

    def _fingerprint(self, arrangements: list[Arrangement], batches: list[int], contexts: list[int]) -> dict[str, Any]:
        """Cache key: a calibration is valid only for this GPU, driver, model and set of options."""
        pipeline = self._pipeline
        return {
            **fingerprint(self._spec, self._device),
            "num_sms": pipeline.green_manager.num_sms,
            "micro_batches": pipeline.num_micro_batches,
            "profiling": self._profiles,
            "batches": batches,
            "contexts": contexts,
            "arrangements": [str(arrangement) for arrangement in arrangements],
        }

    def _measured(self, arrangements: list[Arrangement], batches: list[int], contexts: list[int]) -> list[Measured]:
        paths = {arrangement: self._make_steps(batches, arrangement) for arrangement in (None, *arrangements)}
        self._warm_up(functools.partial(paths[None].replay, batches[-1]))
        points = []
        for batch, context in itertools.product(batches, contexts):
            seconds = {}
            for arrangement, steps in paths.items():
                self._rows.fill_with_dummies(batch, context)
                seconds[arrangement] = self._time(functools.partial(steps.replay, batch))
            pipelined_s = {arrangement: seconds[arrangement] for arrangement in arrangements}
            points.append(Measured(batch, context, seconds[None], pipelined_s))
        self._rows.forget()
        return points

    def _warm_up(self, run: Callable[[], object]) -> None:
        """Keeps the GPU busy until its clocks have come down to their value under load."""
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_UP_S:
            run()
            self._synchronize()

    def _time(self, run: Callable[[], object]) -> float:
        """Median seconds of a run, over NUM_TIMED_STEPS of them back to back."""
        stopwatches = []
        for _ in range(NUM_TIMED_STEPS):
            stopwatch = Stopwatch(self._device)
            run()
            stopwatch.stop()
            stopwatches.append(stopwatch)
        self._synchronize()
        return median(stopwatch.seconds() for stopwatch in stopwatches)
