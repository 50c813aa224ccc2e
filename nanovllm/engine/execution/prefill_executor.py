"""Runs the prefill part of steps: chunks of prompts, from buffers with fixed addresses, by CUDA graphs if there are."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nanovllm.engine.execution.cuda_graph import StepGraphs, StepOutput, prefill_buckets
from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.execution.layer_exchange import LayerExchange
from nanovllm.engine.execution.layer_push import LayerPush
from nanovllm.engine.execution.prefill_buffers import PrefillBuffers
from nanovllm.engine.execution.prefill_layout import PrefillLayout
from nanovllm.engine.execution.prompt_logprobs import prompt_logprobs
from nanovllm.engine.execution.tasks import PrefillTask
from nanovllm.engine.execution.token_counts import TokenCounts
from nanovllm.engine.scheduling.step import MAX_CHUNKS
from nanovllm.kernels import NO_HOOKS, LayerHooks
from nanovllm.layers.sampler import SampledTokens


class PrefillExecutor:
    """Prefill on one device.

    Args:
        forward: the model.
        kv_pool: where KV is stored; its last block pads steps.
        max_prefill_tokens: maximum number of prompt tokens in a step.
        push: whether and how steps push the blocks that they hand over.
        max_num_rows: decode rows that mixed steps have room for besides.
        shares_prompts: whether `share` will be called, before the first step.
    """

    def __init__(
        self,
        forward: ForwardPass,
        kv_pool: torch.Tensor,
        max_prefill_tokens: int,
        push: LayerPush,
        *,
        max_num_rows: int,
        shares_prompts: bool = False,
    ) -> None:
        self._forward = forward
        self._kv_pool = kv_pool
        self._push = push
        self._max_prefill_tokens = max_prefill_tokens
        spec, num_blocks = forward.spec, len(kv_pool) - 1
        block_size = spec.attention.block_size
        self.layout = PrefillLayout(
            # The KV of a step's tokens is in the pool; in a mixed step there are those of decode rows, too.
            min(max_prefill_tokens + max_num_rows, num_blocks * block_size),
            min(MAX_CHUNKS, spec.max_num_seqs),
            spec.max_model_len,
            block_size,
            num_blocks,
            pushes=push.is_on or shares_prompts,
        )
        self.buffers = PrefillBuffers(forward.device, self.layout)
        self.graphs: StepGraphs[StepOutput] | None = None
        self._exchange_graphs: StepGraphs[StepOutput] | None = None
        """Those of steps that exchange KV with the other runner."""
        self._exchange: LayerExchange | None = None

    def capture(self, graph_pool: Any) -> None:
        """Captures a graph for each bucket."""
        sizes = prefill_buckets(min(self._max_prefill_tokens, self.layout.max_num_tokens))
        self.graphs = StepGraphs("prefill", self.run_core, sizes, graph_pool, prepare=self.buffers.send_padding)

    def share(self, exchange: LayerExchange, graph_pool: Any) -> None:
        """Prepares for prompts that another runner computes, too; captures graphs if there is a pool for them."""
        self._exchange = exchange
        if self.graphs is not None:
            run, sizes = functools.partial(self.run_core, exchanges=True), self.graphs.sizes
            prepare = self.buffers.send_padding
            self._exchange_graphs = StepGraphs("exchanging prefill", run, sizes, graph_pool, prepare=prepare)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of the passes that have graphs, ascending; none without graphs."""
        return () if self.graphs is None else tuple(self.graphs.sizes)

    def run(self, task: PrefillTask) -> tuple[SampledTokens | None, SampledTokens | None]:
        """Runs a task: the prompt tokens to report, and a token for each prompt that its chunks complete, or None."""
        self.buffers.send(task.packed)
        in_prompts = None
        output: StepOutput | None
        graphs = self._exchange_graphs if task.exchanges else self.graphs
        if graphs is not None and task.size <= graphs.sizes[-1] and task.prompt_rows is None:
            output = graphs.replay(task.size)
        else:
            # Where the hidden states of all tokens are wanted, too: those of a graph's pass cannot be had after it.
            hidden, output = self._run(task.size, task.num_sampled, exchanges=task.exchanges)
            in_prompts = self.report(hidden, task)
        return in_prompts, None if output is None or not task.num_sampled else self.finish(output, task)

    def report(self, hidden: torch.Tensor, task: PrefillTask) -> SampledTokens | None:
        """The prompt tokens to report, from the hidden states of a task's pass; None for none."""
        return None if task.prompt_rows is None else prompt_logprobs(hidden, task.prompt_rows, self._forward)

    def finish(self, output: StepOutput, task: PrefillTask) -> SampledTokens:
        """The tokens after the last chunks, which come first in the output of the task's step, by all sampling
        parameters."""
        if task.counted is None:
            return self._forward.sampled_tokens(output, task.num_sampled, task.sampling)
        device, ranks = self._forward.device, self._forward.ranks
        counts = TokenCounts(device, task.num_sampled, self._forward.spec.model_config.vocab_size, ranks)
        counts.set(task.counted)
        rows = torch.arange(task.num_sampled, device=device.torch_device)
        return self._forward.sampled_tokens(output, task.num_sampled, task.sampling, counts.tensor, rows)

    def run_core(self, size: int, *, exchanges: bool = False) -> StepOutput:
        """Runs the step in the buffers, padded to `size` tokens and to the maximum number of requests.

        `exchanges` if KV crosses between this runner and another that both prefill and decode.
        """
        _, output = self._run(size, self.layout.max_num_requests, exchanges=exchanges)
        assert output is not None, "a step that is padded to at least one request samples a token"
        return output

    def layer_hooks(self, pushed_blocks: torch.Tensor | None, *, exchanges: bool) -> LayerHooks:
        """What the layers of a step call; `pushed_blocks` are those of `ModelInputs`."""
        if pushed_blocks is None or not (exchanges or self._push.is_on):
            return NO_HOOKS
        if not exchanges:
            return LayerHooks(self._push.after_store(pushed_blocks))
        assert self._exchange is not None, "KV is exchanged by runners that are connected"
        return self._exchange.hooks(pushed_blocks, self.buffers.step_numbers())

    def join(self, *, exchanges: bool) -> None:
        """Makes the current stream wait for what the layers of a step have pushed."""
        (self._exchange if exchanges and self._exchange is not None else self._push).join()

    def _run(self, size: int, num_sampled: int, *, exchanges: bool) -> tuple[torch.Tensor, StepOutput | None]:
        inputs = self.buffers.gather(size, num_sampled)
        hooks = self.layer_hooks(inputs.pushed_blocks, exchanges=exchanges)
        hidden, output = self._forward.run(inputs, self._kv_pool, hooks)
        self.join(exchanges=exchanges)
        return hidden, output
