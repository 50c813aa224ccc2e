"""A rank's share of a step, as arrays that the host sends to its device or to another process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm.engine.execution.model_inputs import SamplingArrays
from nanovllm.engine.execution.prompt_logprobs import PromptRows
from nanovllm.engine.execution.row_table import RowChanges
from nanovllm.engine.execution.token_counts import CountedTokens


@dataclass(frozen=True)
class PrefillTask:
    """Chunks of prompts.

    Attributes:
        packed: [N] int64, the upload, as of `PrefillLayout.pack`.
        size: number of tokens, padded to a bucket if there are graphs.
        num_sampled: requests for which a token is sampled.
        sampling: all sampling parameters, if some request needs more than temperature, seed and output index.
        counted: token counts of the requests that have penalties, by their index among those that sample.
        prompt_rows: the prompt tokens whose log-probabilities are asked for, None for none.
        report: where the step reports how it has waited for the other runner; None if it exchanges no KV.
    """

    packed: np.ndarray
    size: int
    num_sampled: int
    sampling: SamplingArrays | None
    counted: CountedTokens | None
    prompt_rows: PromptRows | None
    report: int | None = None

    @property
    def exchanges(self) -> bool:
        """Whether KV crosses, within the step, between two runners that both prefill and decode."""
        return self.report is not None


@dataclass(frozen=True)
class DecodeTask:
    """A token for each row of the decode batch.

    Attributes:
        changes: to the batch on the device, to apply before the step.
        num_rows: rows of the batch.
        mean_context: mean context length of the rows in tokens, by which the arrangement is chosen.
        sampling: as in `PrefillTask`.
    """

    changes: RowChanges
    num_rows: int
    mean_context: float
    sampling: SamplingArrays | None


@dataclass(frozen=True)
class StepTask:
    """Both parts of a step; None for an empty one."""

    prefill: PrefillTask | None
    decode: DecodeTask | None
