"""Runs steps with both parts in one forward pass: chunks of prompts, and a token for each row of the decode batch.

The rows' tokens come first in the pass, then the chunks'. All of them go through the GEMMs together, so that weights
are read once; each part has its own attention kernel. How many rows there are is read on the device: one graph serves
any division of its tokens. Sampling has graphs of its own, by how many tokens are sampled, since logits are dear.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import abc
from typing import Any, NoReturn

import torch

from nanovllm.engine.execution.cuda_graph import StepGraphs, StepOutput, batch_buckets, mixed_buckets
from nanovllm.engine.execution.decode_executor import DecodeExecutor
from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.execution.prefill_executor import PrefillExecutor
from nanovllm.engine.execution.tasks import DecodeTask, PrefillTask
from nanovllm.kernels import RowField
from nanovllm.layers.sampler import SampledTokens, SamplingInputs
from nanovllm.utils.device import Device


class MixedExecutor:
    """Runs mixed steps on one device, over the prefill executor's buffers and the decode executor's batch.

    Args:
        forward: the model.
        kv_pool: where KV is stored; its last block pads steps.
        prefill, decode: what runs the two parts when they are alone.
    """

    def __init__(
        self, forward: ForwardPass, kv_pool: torch.Tensor, prefill: PrefillExecutor, decode: DecodeExecutor
    ) -> None:
        self._forward = forward
        self._kv_pool = kv_pool
        self._prefill = prefill
        self._decode = decode
        self.max_num_sampled = decode.max_num_rows + prefill.layout.max_num_requests
        spec, where = forward.spec, forward.device.torch_device
        # At a fixed address: what one graph leaves in the memory that it shares with others, another may overwrite.
        shape = (self.max_num_sampled, spec.model_config.hidden_size)
        self._sampled_hidden = torch.zeros(shape, dtype=spec.dtype, device=where)
        self._places = torch.arange(self.max_num_sampled, device=where)
        # For the attention of rows, which is memory-bound, beside that of chunks, which is compute-bound.
        self._decode_stream = (
            torch.cuda.Stream(forward.device.index, priority=-1)
            if forward.device.is_cuda and spec.attention.backend.skips_empty_requests
            else None
        )
        self._pass_graphs: StepGraphs[None] | None = None
        self._exchange_graphs: StepGraphs[None] | None = None
        """Those of steps that exchange KV with the other runner."""
        self._sampling_graphs: StepGraphs[StepOutput] | None = None

    def capture(self, graph_pool: Any) -> None:
        """Captures the graphs of passes and of sampling, over a step of one row, the padding row."""
        pass_sizes = mixed_buckets(self._prefill.layout.max_num_tokens)
        self._pass_graphs = StepGraphs("mixed", self.run_core, pass_sizes, graph_pool, prepare=self._send_padding_row)
        sizes = batch_buckets(self.max_num_sampled)
        self._sampling_graphs = StepGraphs("sampling", self.run_sampling_core, sizes, graph_pool)

    def capture_exchange(self, graph_pool: Any) -> None:
        """Captures graphs of passes that exchange KV with the other runner."""
        assert self._pass_graphs is not None, "those of other passes are captured first"
        run, sizes = functools.partial(self.run_core, exchanges=True), self._pass_graphs.sizes
        self._exchange_graphs = StepGraphs("exchanging mixed", run, sizes, graph_pool, prepare=self._send_padding_row)

    def _send_padding_row(self, size: int) -> None:
        """Makes the step on the device one of the padding row and tokens of padding."""
        self._decode.rows.pad(self._decode.max_num_rows)
        self._prefill.buffers.send_padding(size, num_rows=1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of the passes that have graphs, ascending; none without graphs."""
        return () if self._pass_graphs is None else tuple(self._pass_graphs.sizes)

    def run(self, prefill: PrefillTask, decode: DecodeTask) -> abc.Iterator[SampledTokens | None]:
        """The prompt tokens to report, what is sampled after the chunks, and [num_rows] tokens for the rows.

        The first two are None if there are none.
        """
        self._decode.apply(decode)
        self._prefill.buffers.send(prefill.packed)
        num_rows, num_sampled = decode.num_rows, decode.num_rows + prefill.num_sampled
        graphs = self._exchange_graphs if prefill.exchanges else self._pass_graphs
        if graphs is not None and prefill.size <= graphs.sizes[-1] and prefill.prompt_rows is None:
            graphs.replay(prefill.size)
            yield None
        else:
            hidden = self._run_pass(prefill.size, num_rows, exchanges=prefill.exchanges)
            yield self._prefill.report(hidden, prefill)
        if self._sampling_graphs is not None:
            output = self._sampling_graphs.replay(self._sampling_graphs.size_for(num_sampled))
        else:
            output = self.run_sampling_core(num_sampled)
        after_chunks = None
        if prefill.num_sampled:
            after_chunks = self._prefill.finish(_rows_of(output, num_rows, num_sampled), prefill)
            self._decode.keep_tokens(after_chunks.token_ids)
        yield after_chunks
        yield self._decode.finish(output, decode)

    def run_core(self, size: int, *, exchanges: bool = False) -> None:
        """The pass over `size` tokens, on the device alone, with as many rows as fit.

        `exchanges` if KV crosses between this runner and another that both prefill and decode.
        """
        self._run_pass(size, min(size, self._decode.max_num_rows), exchanges=exchanges)

    def run_sampling_core(self, size: int) -> StepOutput:
        """Samples a token for each row and after each last chunk of the pass before, `size` in all, padded; and makes
        the rows' tokens the input of the next step."""
        most_rows = min(size, self._decode.max_num_rows)
        rows, chunks = self._decode.rows.gather(most_rows), self._prefill.buffers.sampling()
        is_row, at_row, at_chunk = self._parts(size, most_rows)
        sampling = SamplingInputs(
            torch.where(is_row, rows.sampling.temperatures[at_row], chunks.temperatures[at_chunk]),
            torch.where(is_row, rows.fields[RowField.SEED][at_row], chunks.seeds[at_chunk]),
            torch.where(is_row, rows.fields[RowField.OUTPUT_INDEX][at_row], chunks.output_indices[at_chunk]),
        )
        output = self._forward.sample(self._sampled_hidden[:size], sampling)
        # Behind the rows that there are the batch is padding rows, which the tokens of chunks do no harm.
        self._decode.rows.advance(rows, output.sampled.token_ids[:most_rows])
        return output

    def _run_pass(self, size: int, most_rows: int, *, exchanges: bool) -> torch.Tensor:
        """The hidden states of a pass over `size` tokens, of which at most `most_rows` are rows'.

        It leaves those to sample from to `run_sampling_core`. `most_rows` is an upper bound in a graph, and the number
        of rows without one.
        """
        rows, chunks = self._decode.rows.gather(most_rows), self._prefill.buffers.gather(size, 0)
        num_rows = chunks.metadata.query_starts[0]
        is_row = self._places[:most_rows] < num_rows
        metadata = chunks.metadata
        for of_chunks, of_rows in (
            (chunks.input_ids, rows.input_ids),
            (chunks.positions, rows.positions),
            (metadata.slot_mapping, rows.metadata.slot_mapping),
        ):
            of_chunks[:most_rows] = torch.where(is_row, of_rows, of_chunks[:most_rows])
        # The attention of rows gets nothing to do behind those that there are.
        context_lens = torch.where(is_row, rows.metadata.context_lens, 0)
        metadata = dataclasses.replace(
            metadata,
            decode=dataclasses.replace(rows.metadata, context_lens=context_lens),
            decode_stream=self._decode_stream,
            hooks=self._prefill.layer_hooks(chunks.pushed_blocks, exchanges=exchanges),
        )
        hidden = self._forward.hidden_states(chunks.input_ids, chunks.positions, metadata, self._kv_pool)
        self._prefill.join(exchanges=exchanges)
        is_row, at_row, at_chunk = self._parts(self.max_num_sampled, most_rows)
        sampled_rows = torch.where(is_row, at_row, self._prefill.buffers.sampled_rows()[at_chunk])
        torch.index_select(hidden, 0, sampled_rows, out=self._sampled_hidden)
        return hidden

    def _parts(self, size: int, most_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each of `size` sampled tokens: whether it is a row's, and its index among rows and among last chunks."""
        places = self._places[:size]
        num_rows = self._prefill.buffers.num_rows()
        at_chunk = (places - num_rows).clamp(0, self._prefill.layout.max_num_requests - 1)
        return places < num_rows, places.clamp(max=most_rows - 1), at_chunk


class NoMixedSteps:
    """Stands in where a runner only prefills."""

    max_num_sampled = 0
    sizes: tuple[int, ...] = ()

    def __init__(self, device: Device) -> None:
        self._device = device

    def capture(self, graph_pool: Any) -> None: ...

    def capture_exchange(self, graph_pool: Any) -> None:
        self._refuse()

    def run(self, prefill: PrefillTask, decode: DecodeTask) -> abc.Iterator[SampledTokens | None]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AssertionError(f"{self._device} was made for prefill, it does not decode")


def _rows_of(output: StepOutput, start: int, end: int) -> StepOutput:
    return StepOutput(output.logits[start:end], SampledTokens(output.sampled.token_ids[start:end]))
