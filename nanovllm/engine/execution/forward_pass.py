"""One forward pass of a model over a KV pool, and sampling from its logits: what prefill and decode have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from nanovllm.engine.execution.cuda_graph import StepOutput
from nanovllm.engine.execution.model_inputs import ModelInputs, SamplingArrays
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.ranks import Ranks
from nanovllm.layers.sampler import SampledTokens, SamplingInputs, sample
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.device import Device


class ForwardPass:
    """Runs a model on the current stream of its device.

    Args:
        device: where the model is.
        spec: its sizes and kernels.
        ranks: those that compute it together.
        model: the model.
    """

    def __init__(self, device: Device, spec: RunnerSpec, ranks: Ranks, model: CausalLM) -> None:
        self.device = device
        self.spec = spec
        self.ranks = ranks
        self.model = model
        self._logits: torch.Tensor | None = None

    def share_logits(self, most_rows: int) -> None:
        """Has all graphs leave their logits, which are large, in one place. They must run one at a time."""
        vocab_size = self.spec.model_config.vocab_size // self.ranks.size
        where = self.device.torch_device
        self._logits = torch.empty(most_rows, vocab_size, dtype=self.spec.dtype, device=where)

    def run(
        self,
        inputs: ModelInputs,
        kv_pool: torch.Tensor,
        after_store: Callable[[torch.Tensor], None] | None = None,
    ) -> StepOutput | None:
        """The whole pass; None if no row of it is sampled. `after_store` is called with each layer's KV once stored."""
        metadata = self.split_work(inputs.metadata)
        if after_store is not None:
            metadata = dataclasses.replace(metadata, after_store=after_store)
        hidden = self.model(inputs.input_ids, inputs.positions, kv_pool, metadata)
        if inputs.sampling is None:
            return None
        return self.sample(hidden[inputs.sampled_rows], inputs.sampling)

    def split_work(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """The metadata with the attention kernel's division of work, if it has one."""
        split = self.spec.attention.backend.split_work(metadata, self.spec.num_kv_heads)
        return dataclasses.replace(metadata, work_split=split)

    def sample(self, hidden: torch.Tensor, sampling: SamplingInputs) -> StepOutput:
        """[B, hidden_size] -> logits, and the tokens sampled from them."""
        out = None if self._logits is None or len(hidden) > len(self._logits) else self._logits[: len(hidden)]
        logits = self.model.compute_logits(hidden, out=out)
        return StepOutput(logits, sample(logits, sampling, self.spec.attention.backend, self.ranks))

    def sampled_tokens(
        self,
        output: StepOutput,
        num_rows: int,
        sampling: SamplingArrays | None,
        counts: torch.Tensor | None = None,
        count_rows: torch.Tensor | None = None,
    ) -> SampledTokens:
        """The tokens of a step's first rows: those it has sampled, or others by all of their parameters.

        Steps sample by temperature, seed and index; where some request filters, wants log-probabilities, has penalties
        or biases, or may not stop yet, only the host knows how. `counts` and `count_rows`: see `Penalties`.
        """
        if sampling is None:
            return SampledTokens(output.sampled.token_ids[:num_rows])
        backend = self.spec.attention.backend
        return sample(output.logits[:num_rows], sampling.on(self.device, counts, count_rows), backend, self.ranks)
