"""Runs the prompt part of steps: chunks of prompts, from buffers that stay where they are, by graphs if there are."""

from __future__ import annotations

from collections import abc
from typing import Any

import torch

from nanovllm.engine.execution.cuda_graph import StepGraphs, StepOutput, token_buckets
from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.execution.layer_push import LayerPush
from nanovllm.engine.execution.model_inputs import sampling_arrays
from nanovllm.engine.execution.prefill_buffers import PrefillBuffers
from nanovllm.engine.execution.tasks import PrefillTask
from nanovllm.engine.execution.token_counts import TokenCounts, count_tokens
from nanovllm.engine.scheduling.step import MOST_CHUNKS, PrefillChunk
from nanovllm.layers.sampler import SampledTokens


class PrefillExecutor:
    """Prefill on one device.

    Args:
        forward: the model.
        kv_pool: where KV is stored; its last block pads steps.
        max_prompt_tokens: most tokens of a step.
        push: what becomes of the blocks that a step hands over.
    """

    def __init__(self, forward: ForwardPass, kv_pool: torch.Tensor, max_prompt_tokens: int, push: LayerPush) -> None:
        self._forward = forward
        self._kv_pool = kv_pool
        self._push = push
        spec, num_blocks = forward.spec, len(kv_pool) - 1
        block_size = spec.attention.block_size
        self.buffers = PrefillBuffers(
            forward.device,
            min(max_prompt_tokens, num_blocks * block_size),  # the KV of a step's tokens is in the pool
            min(MOST_CHUNKS, spec.max_num_seqs),
            spec.max_model_len,
            block_size,
            num_blocks,
            pushes=push.is_on,
        )
        self.graphs: StepGraphs | None = None

    def capture(self, graph_pool: Any) -> None:
        """Captures a graph for each size. The first tokens of block 0 are written to; no request has it yet."""
        self.graphs = StepGraphs("prefill", self.run_core, token_buckets(self.buffers.max_num_tokens), graph_pool)

    def make_task(self, chunks: abc.Sequence[PrefillChunk], *, samples_in_graph: bool) -> PrefillTask:
        """What every rank is to be told of these chunks."""
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        last = [(chunk.seq, chunk.end - chunk.seq.num_prompt_tokens) for chunk in chunks if chunk.is_last]
        size = num_tokens if self.graphs is None else self.graphs.size_for(num_tokens)
        vocab_size = self._forward.spec.model_config.vocab_size
        sampling = None if samples_in_graph or not last else sampling_arrays(last, vocab_size)
        counted = None if sampling is None else count_tokens((index, seq) for index, (seq, _) in enumerate(last))
        return PrefillTask(self.buffers.pack(chunks, size), size, len(last), sampling, counted)

    def run(self, task: PrefillTask) -> SampledTokens | None:
        """A token for each prompt that the chunks complete; None if they complete none."""
        self.buffers.send(task.packed)
        if self.graphs is not None:
            output: StepOutput | None = self.graphs.replay(task.size)
        else:
            output = self._run(task.size, task.num_sampled)
        if output is None or not task.num_sampled:
            return None
        if task.counted is None:
            return self._forward.sampled_tokens(output, task.num_sampled, task.sampling)
        device, ranks = self._forward.device, self._forward.ranks
        counts = TokenCounts(device, task.num_sampled, self._forward.spec.model_config.vocab_size, ranks)
        counts.set(task.counted)
        rows = torch.arange(task.num_sampled, device=device.torch_device)
        return self._forward.sampled_tokens(output, task.num_sampled, task.sampling, counts.tensor, rows)

    def run_core(self, size: int) -> StepOutput:
        """The buffered step, padded to `size` tokens and to all the requests that there could be."""
        output = self._run(size, self.buffers.max_num_requests)
        assert output is not None, "a step that is padded to some requests samples for them"
        return output

    def _run(self, size: int, num_sampled: int) -> StepOutput | None:
        inputs = self.buffers.gather(size, num_sampled)
        after_store = None if inputs.pushed_blocks is None else self._push.after_store(inputs.pushed_blocks)
        output = self._forward.run(inputs, self._kv_pool, after_store)
        self._push.join()
        return output
