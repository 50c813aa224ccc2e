"""A rank's share of a step: arrays alone, which the host would send to its device or to another process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm.engine.execution.device_decode_batch import RowChanges
from nanovllm.engine.execution.model_inputs import SamplingArrays


@dataclass(frozen=True)
class PrefillTask:
    """A rank's share of a prefill step: what its `PrefillBuffers` take, and how many requests sample."""

    numbers: np.ndarray
    size: int
    num_sampled: int
    sampling: SamplingArrays | None
    """Where it takes more than each request's temperature, seed and index."""


@dataclass(frozen=True)
class DecodeTask:
    """A rank's share of a decode step: what it changes of the rows, and how many of them it runs."""

    changes: RowChanges
    num_rows: int
    sampling: SamplingArrays | None


Task = PrefillTask | DecodeTask
