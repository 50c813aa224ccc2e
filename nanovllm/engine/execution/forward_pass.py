"""One forward pass of a model over a KV pool, and sampling from its logits: what prefill and decode have in common."""

from __future__ import annotations

import dataclasses

import torch

from nanovllm.engine.execution.cuda_graph import StepOutput
from nanovllm.engine.execution.model_inputs import ModelInputs, SamplingArrays
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.kernels import NO_HOOKS, AttentionMetadata, LayerHooks
from nanovllm.layers.ranks import Ranks
from nanovllm.layers.sampler import SampledTokens, SamplingInputs, sample
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.device import Device


class ForwardPass:
    """Runs a model on the current stream of its device.

    Args:
        device: where the model is.
        spec: its sizes and kernels.
        ranks: all ranks that compute the model together.
        model: the model.
    """

    def __init__(self, device: Device, spec: RunnerSpec, ranks: Ranks, model: CausalLM) -> None:
        self.device = device
        self.spec = spec
        self.ranks = ranks
        self.model = model
        self._logits: torch.Tensor | None = None

    def share_logits(self, most_rows: int) -> None:
        """Makes all graphs write their logits, which are large, to one buffer. Graphs must run one at a time."""
        vocab_size = self.spec.model_config.vocab_size // self.ranks.size
        where = self.device.torch_device
        self._logits = torch.empty(most_rows, vocab_size, dtype=self.spec.dtype, device=where)

    def run(
        self,
        inputs: ModelInputs,
        kv_pool: torch.Tensor,
        hooks: LayerHooks = NO_HOOKS,
    ) -> tuple[torch.Tensor, StepOutput | None]:
        """Runs the pass: its hidden states as of `hidden_states`, and what is sampled, None if no row is.

        Each layer calls `hooks`.
        """
        metadata = dataclasses.replace(inputs.metadata, hooks=hooks)
        hidden = self.hidden_states(inputs.input_ids, inputs.positions, metadata, kv_pool)
        if inputs.sampling is None:
            return hidden, None
        return hidden, self.sample(hidden[inputs.sampled_rows], inputs.sampling)

    def hidden_states(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata, kv_pool: torch.Tensor
    ) -> torch.Tensor:
        """[T] int64 tokens and positions -> [T, hidden_size], after the final norm; their KV is stored in the pool."""
        metadata = self._with_work_split(metadata, kv_pool[:, 0])
        return self.model(input_ids, positions, kv_pool, metadata)

    def _with_work_split(self, metadata: AttentionMetadata, kv_cache: torch.Tensor) -> AttentionMetadata:
        """The metadata with the attention backend's division of the step's work, if it makes one."""
        split = self.spec.attention.backend.split_work(metadata, self.spec.num_heads, kv_cache)
        decode = None if metadata.decode is None else self._with_work_split(metadata.decode, kv_cache)
        return dataclasses.replace(metadata, work_split=split, decode=decode)

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
        """The tokens of the first `num_rows` rows: as the step sampled them, or sampled again by `sampling`.

        Steps sample by temperature, seed and output index alone. Where some request uses another parameter, the tokens
        of all rows are sampled again from the step's logits. `counts` and `count_rows`: see `Penalties`.
        """
        if sampling is None:
            return SampledTokens(output.sampled.token_ids[:num_rows])
        backend = self.spec.attention.backend
        return sample(output.logits[:num_rows], sampling.on(self.device, counts, count_rows), backend, self.ranks)
