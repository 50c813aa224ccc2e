"""A rank's share of a step: arrays alone, which the host would send to its device or to another process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm.engine.execution.device_decode_batch import RowChanges
from nanovllm.engine.execution.model_inputs import SamplingArrays
from nanovllm.engine.execution.token_counts import CountedTokens


@dataclass(frozen=True)
class PrefillTask:
    """Chunks of prompts.

    Attributes:
        packed: [N] int64, what `PrefillBuffers` take.
        size: tokens, padded to a graph's size if there are graphs.
        num_sampled: requests for which a token is sampled.
        sampling: where it takes more than each request's temperature, seed and index.
        counted: the tokens so far of the requests that have penalties, by their number among those that sample.
    """

    packed: np.ndarray
    size: int
    num_sampled: int
    sampling: SamplingArrays | None
    counted: CountedTokens | None


@dataclass(frozen=True)
class DecodeTask:
    """A token for each row of the decode batch.

    Attributes:
        changes: what the step changes of the rows.
        num_rows: how many it runs.
        mean_context: their mean context length in tokens, by which a pipeline chooses its way.
        sampling: as above.
    """

    changes: RowChanges
    num_rows: int
    mean_context: float
    sampling: SamplingArrays | None


@dataclass(frozen=True)
class StepTask:
    """Either part may be missing."""

    prefill: PrefillTask | None
    decode: DecodeTask | None
