"""Prompts beside decode on two SM partitions of a GPU, and mixed steps: which computes more of prompts for equal gaps?

Mixed steps are forward passes of decode rows and a chunk of a prompt together. On partitions (CUDA green contexts)
decode steps run on some SMs and steps of a longer chunk on the rest, each at its own pace. Both are CUDA graphs of the
same model without sampling, timed by the GPU's clock. In the last column are the prompt tokens that mixed steps compute
in a millisecond if they have as many as make them as long as the partition's decode steps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch

from lib.arguments import add_shape, model_options, new_parser, sm_split
from lib.report import report
from lib.side_by_side import Work, measure_us
from nanovllm import LLM
from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ends_with_message
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.ranks import OneRank

BESIDE_MS = 250
TIMES_ALONE = 6


@dataclass(frozen=True)
class Part:
    """Decode rows, or a chunk: tokens, their positions, and where they are in the pool."""

    positions: torch.Tensor
    metadata: AttentionMetadata


class Passes:
    """Forward passes over a runner's pool, whose content does not matter."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._forward = ForwardPass(runner.device, runner.spec, OneRank(), runner.model)
        self._rows_stream = torch.cuda.Stream(priority=-1)

    def rows(self, batch: int, context: int) -> Part:
        """A token for each of `batch` requests of `context` tokens."""
        return self._part([context] * batch, 1, first_block=0)

    def chunk(self, start: int, num_tokens: int, *, first_block: int) -> Part:
        """So many tokens of a prompt behind its first `start`."""
        return self._part([start + num_tokens], num_tokens, first_block=first_block)

    def _part(self, context_lens: list[int], num_tokens: int, *, first_block: int) -> Part:
        """The last `num_tokens` of each request, in blocks from `first_block` on."""
        size = self.runner.block_size
        per_request = -(-max(context_lens) // size)
        tables = first_block + torch.arange(len(context_lens) * per_request, dtype=torch.int32).view(-1, per_request)
        if int(tables.max()) >= self.runner.num_kv_blocks:
            raise SystemExit(f"the KV pool has {self.runner.num_kv_blocks} blocks: too few for so many requests")
        positions = torch.stack([torch.arange(length - num_tokens, length) for length in context_lens])
        slots = tables.gather(1, positions // size).long() * size + positions % size
        starts = torch.arange(len(context_lens) + 1, dtype=torch.int32) * num_tokens
        metadata = AttentionMetadata(
            slots.flatten().cuda(),
            tables.cuda(),
            torch.tensor(context_lens, dtype=torch.int32, device="cuda"),
            starts.cuda(),
            num_tokens,
            max(context_lens),
        )
        return Part(positions.flatten().cuda(), metadata)

    def work(self, part: Part, num_sms: int | None, *, num_logits: int) -> Work:
        """A pass over one part, on so many SMs, with the logits of the first tokens."""
        return self._work(part.positions, replace(part.metadata, num_sms=num_sms), num_logits)

    def mixed(self, rows: Part, chunk: Part) -> Work:
        """A pass over both parts, whose attention runs side by side."""
        num_rows, of_rows, of_chunk = len(rows.positions), rows.metadata, chunk.metadata
        metadata = replace(
            of_chunk,
            slot_mapping=torch.cat((of_rows.slot_mapping, of_chunk.slot_mapping)),
            query_starts=of_chunk.query_starts + num_rows,
            decode=of_rows,
            decode_stream=self._rows_stream,
        )
        return self._work(torch.cat((rows.positions, chunk.positions)), metadata, num_rows + 1)

    def _work(self, positions: torch.Tensor, metadata: AttentionMetadata, num_logits: int) -> Work:
        token_ids = torch.arange(len(positions), device="cuda") % 1000

        def run(turn: int) -> None:
            hidden = self._forward.hidden_states(token_ids, positions, metadata, self.runner.kv_pool)
            self.runner.model.compute_logits(hidden[:num_logits])

        return run


def measure(passes: Passes, batch: int, context: int, args: argparse.Namespace) -> dict[str, object]:
    """Times of one batch, by both ways."""
    rows, stream = passes.rows(batch, context), torch.cuda.Stream()
    first_block = batch * -(-context // passes.runner.block_size)

    def alone_ms(on: torch.cuda.Stream, work: Work) -> float:
        return measure_us((on, work), times_alone=TIMES_ALONE)[0] / 1e3

    plain_ms = alone_ms(stream, passes.work(rows, None, num_logits=batch))
    print(f"{batch} requests of {context} tokens, prompts behind {args.start}: decode alone {plain_ms:.2f} ms")
    mixed_ms = {}
    for num_tokens in args.chunks:
        chunk = passes.chunk(args.start, num_tokens, first_block=first_block)
        mixed_ms[num_tokens] = alone_ms(stream, passes.mixed(rows, chunk))
        rate = num_tokens / mixed_ms[num_tokens]
        print(f"  mixed, {num_tokens:5} tokens {mixed_ms[num_tokens]:8.2f} ms {rate:8.1f} tokens/ms", flush=True)
    long_chunk = passes.chunk(args.start, args.partition_chunk, first_block=first_block)
    # In time order for the interpolation; a longer step has more tokens of a prompt.
    times, rates = [plain_ms, *mixed_ms.values()], [0.0, *(tokens / ms for tokens, ms in mixed_ms.items())]
    split_rows = []
    for split in args.splits:
        manager = GreenManager(passes.runner.device, *split)
        streams = [of_lane for of_lane in manager.allocate().streams.values() if of_lane is not None]
        works = [
            passes.work(rows, split[0], num_logits=batch),
            passes.work(long_chunk, split[1], num_logits=1),
        ]
        alone = [alone_ms(on, work) for on, work in zip(streams, works, strict=True)]
        both = measure_us(*zip(streams, works, strict=True), alone_us=[1e3 * ms for ms in alone], beside_ms=BESIDE_MS)
        decode_ms, chunk_ms = (us / 1e3 for us in both)
        rate, mixed_rate = args.partition_chunk / chunk_ms, float(np.interp(decode_ms, times, rates))
        print(
            f"  {split[0]:3}:{split[1]:<3} decode {decode_ms:6.2f} ms (alone {alone[0]:.2f}), chunk of "
            f"{args.partition_chunk} {chunk_ms:7.2f} ms (alone {alone[1]:.2f}): {rate:6.1f} tokens/ms; "
            f"mixed as long {mixed_rate:6.1f}",
            flush=True,
        )
        split_rows.append({"split": split, "decode_ms": decode_ms, "chunk_ms": chunk_ms, "alone_ms": alone})
        torch.cuda.synchronize()
        manager.close()
    return {"batch": batch, "context": context, "plain_ms": plain_ms, "mixed_ms": mixed_ms, "splits": split_rows}


def batch_of(text: str) -> tuple[int, int]:
    """`64x2048`, as an argument, is 64 requests of 2,048 tokens."""
    batch, context = map(int, text.split("x"))
    return batch, context


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-8b")
    parser.add_argument("--batches", type=batch_of, nargs="+", default=[(8, 4096), (64, 4096), (128, 1024)])
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="of mixed steps")
    parser.add_argument("--partition-chunk", type=int, default=2048, help="tokens of a step on its partition")
    parser.add_argument("--start", type=int, default=2048, help="tokens of the prompt before the chunk")
    parser.add_argument("--splits", type=sm_split, nargs="+", default=[(32, 100), (64, 68), (84, 48)])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    with LLM(**model_options(args), enforce_eager=True) as llm, torch.inference_mode():
        passes = Passes(llm.decode_runner)
        rows = [measure(passes, batch, context, args) for batch, context in args.batches]
    report("prompt_partition", {**vars(args), "rows": rows}, args.output)


if __name__ == "__main__":
    main()
