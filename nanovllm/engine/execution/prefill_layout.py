"""How a prefill step is laid out in the one upload that a device gets of it, and packing it on the host. No device."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.execution.model_inputs import block_list
from nanovllm.engine.scheduling.step import PrefillChunk

NUM_STEP_NUMBERS = 3
"""Numbers sent for a step as a whole: those of `LayerExchange.hooks`."""
NUM_TOKEN_COLUMNS = 3
"""Numbers sent for each token: its id, position and slot."""
NUM_REQUEST_COLUMNS = 7
"""Numbers sent for each request: context length, start and end in the step, sampled row, seed, output index,
temperature. The block table follows. Where the first request starts, there end the decode rows of a mixed step."""


@dataclass(frozen=True)
class PrefillLayout:
    """The upload of steps of at most `max_num_tokens` tokens of `max_num_requests` requests.

    A step is padded with tokens of no request, whose KV goes to `padding_block`, and with requests without tokens.
    Blocks to hand over are sent with the step if `pushes`.
    """

    max_num_tokens: int
    max_num_requests: int
    max_model_len: int
    block_size: int
    padding_block: int
    pushes: bool

    @property
    def first_padding_slot(self) -> int:
        return self.padding_block * self.block_size

    @property
    def padding_slot(self) -> int:
        # The last slot of the block: the KV store clears what follows a token in its tile.
        return self.first_padding_slot + self.block_size - 1

    @property
    def max_blocks(self) -> int:
        """Blocks of a request of `max_model_len` tokens."""
        return -(-self.max_model_len // self.block_size)

    @property
    def num_request_numbers(self) -> int:
        return self.max_num_requests * (NUM_REQUEST_COLUMNS + self.max_blocks)

    @property
    def size(self) -> int:
        """Numbers of the largest upload."""
        most_pushed_numbers = 1 + 4 * self.max_num_requests * self.max_blocks
        num_tokens_numbers = NUM_TOKEN_COLUMNS * self.max_num_tokens
        return NUM_STEP_NUMBERS + self.num_request_numbers + num_tokens_numbers + most_pushed_numbers

    def pack(
        self,
        chunks: abc.Sequence[PrefillChunk],
        size: int,
        *,
        num_rows: int = 0,
        step_numbers: tuple[int, int, int] = (0, 0, 0),
    ) -> np.ndarray:
        """The upload for these chunks, padded to `size` tokens: [N] int64.

        The first `num_rows` tokens are left to decode rows, whose ids, positions and slots the device has.
        `step_numbers` are those of `LayerExchange.hooks`.
        """
        num_numbers = NUM_STEP_NUMBERS + self.num_request_numbers + NUM_TOKEN_COLUMNS * size
        parts = [part for chunk in chunks for part in chunk.handoff_parts(self.block_size)] if self.pushes else []
        pushed = block_list(parts)
        numbers = np.zeros(num_numbers + len(pushed), dtype=np.int64)
        numbers[:NUM_STEP_NUMBERS] = step_numbers
        numbers[num_numbers:] = pushed
        requests, tokens = self.views(numbers, size)
        context_lens, starts, ends, sampled_rows, seeds, output_indices, temperatures = requests[:NUM_REQUEST_COLUMNS]
        tables = requests[NUM_REQUEST_COLUMNS:].T
        token_ids, positions, slots = tokens
        slots[:] = self.padding_slot
        end, num_sampled = num_rows, 0
        for row, chunk in enumerate(chunks):
            seq, table = chunk.seq, np.array(chunk.allocation.blocks, dtype=np.int64)
            first, end = end, end + chunk.end - chunk.start
            offsets = np.arange(chunk.start, chunk.end)
            token_ids[first:end] = seq.token_ids[chunk.start : chunk.end]
            positions[first:end] = offsets
            slots[first:end] = table[offsets // self.block_size] * self.block_size + offsets % self.block_size
            num_blocks = -(-chunk.end // self.block_size)
            tables[row, :num_blocks] = table[:num_blocks]
            context_lens[row], starts[row], ends[row] = chunk.end, first, end
            if chunk.is_last:
                sampled_rows[num_sampled] = end - 1
                seeds[num_sampled] = seq.seed
                output_indices[num_sampled] = chunk.end - seq.num_prompt_tokens
                temperatures.view(np.float64)[num_sampled] = seq.params.float32_temperature
                num_sampled += 1
        starts[len(chunks) :] = ends[len(chunks) :] = end
        return numbers

    def views(self, numbers, size):  # type: ignore[no-untyped-def] # numpy and torch alike
        """[columns, max_num_requests] and [NUM_TOKEN_COLUMNS, size] views of an upload."""
        first = NUM_STEP_NUMBERS + self.num_request_numbers
        requests = numbers[NUM_STEP_NUMBERS:first].reshape(-1, self.max_num_requests)
        last = first + NUM_TOKEN_COLUMNS * size
        return requests, numbers[first:last].reshape(NUM_TOKEN_COLUMNS, size)
