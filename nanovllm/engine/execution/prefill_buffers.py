"""One prefill step on the device, in buffers with fixed addresses, so that a graph can be captured over them."""

from __future__ import annotations

from collections import abc, deque

import numpy as np
import torch

from nanovllm.engine.execution.model_inputs import ModelInputs, block_list
from nanovllm.engine.scheduling.step import PrefillChunk
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.sampler import SamplingInputs
from nanovllm.utils.device import Device, DoneEvent, Event

NUM_UPLOADS = 4
"""More than the steps that are in flight, so that a launch need not wait for the copy of an earlier one."""
NUM_STEP_NUMBERS = 3
"""Numbers sent for a step as a whole: those of `LayerExchange.hooks`."""
NUM_TOKEN_COLUMNS = 3
"""Numbers sent for each token: its id, position and slot."""
NUM_REQUEST_COLUMNS = 7
"""Numbers sent for each request: context length, start and end in the step, sampled row, seed, output index,
temperature. The block table follows. Where the first request starts, there end the decode rows of a mixed step."""


class PrefillBuffers:
    """Room for steps of at most `max_num_tokens` tokens of `max_num_requests` requests.

    A step is padded with tokens of no request, whose KV goes to `padding_block`, and with requests without tokens.
    Blocks to hand over are sent with the step if `pushes`.
    """

    def __init__(
        self,
        device: Device,
        max_num_tokens: int,
        max_num_requests: int,
        max_model_len: int,
        block_size: int,
        padding_block: int,
        *,
        pushes: bool,
    ) -> None:
        self.device = device
        self.max_num_tokens = max_num_tokens
        self.max_num_requests = max_num_requests
        self.max_model_len = max_model_len
        self.block_size = block_size
        self._first_padding_slot = padding_block * block_size
        # The last slot of the block: the KV store clears what follows a token in its tile.
        self._padding_slot = self._first_padding_slot + block_size - 1
        self._max_blocks = -(-max_model_len // block_size)
        self._num_request_numbers = max_num_requests * (NUM_REQUEST_COLUMNS + self._max_blocks)
        self._pushes = pushes
        most_pushed_numbers = 1 + 4 * max_num_requests * self._max_blocks
        size = NUM_STEP_NUMBERS + self._num_request_numbers + NUM_TOKEN_COLUMNS * max_num_tokens + most_pushed_numbers
        self._numbers = torch.zeros(size, dtype=torch.int64, device=device.torch_device)
        self._uploads: deque[tuple[torch.Tensor, Event]] = deque()
        """Pinned memory from which uploads are copied, and the end of the last copy from it."""
        for _ in range(NUM_UPLOADS if device.is_cuda else 0):
            self._uploads.append((torch.zeros(size, dtype=torch.int64, device="cpu", pin_memory=True), DoneEvent()))

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
        num_numbers = NUM_STEP_NUMBERS + self._num_request_numbers + NUM_TOKEN_COLUMNS * size
        parts = [part for chunk in chunks for part in chunk.handoff_parts(self.block_size)] if self._pushes else []
        pushed = block_list(parts)
        numbers = np.zeros(num_numbers + len(pushed), dtype=np.int64)
        numbers[:NUM_STEP_NUMBERS] = step_numbers
        numbers[num_numbers:] = pushed
        requests, tokens = self._views(numbers, size)
        context_lens, starts, ends, sampled_rows, seeds, output_indices, temperatures = requests[:NUM_REQUEST_COLUMNS]
        tables = requests[NUM_REQUEST_COLUMNS:].T
        token_ids, positions, slots = tokens
        slots[:] = self._padding_slot
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

    def send_padding(self, size: int, *, num_rows: int = 0) -> None:
        """Makes the step on the device one of padding alone, as of `pack`."""
        self.send(self.pack([], size, num_rows=num_rows))

    def send(self, numbers: np.ndarray) -> None:
        """Copies an upload of `pack` to the device, in one copy; on each rank."""
        upload, target = torch.from_numpy(numbers), self._numbers[: len(numbers)]
        if not self._uploads:
            target.copy_(upload)
            return
        pinned, copied = self._uploads[0]
        copied.synchronize()
        pinned[: len(numbers)].copy_(upload)
        target.copy_(pinned[: len(numbers)], non_blocking=True)
        self._uploads[0] = pinned, self.device.record_event()
        self._uploads.rotate(-1)

    def gather(self, size: int, num_sampled: int) -> ModelInputs:
        """The inputs of the step, padded to `size` tokens and `num_sampled` sampled rows; runs on the device alone."""
        requests, tokens = self._views(self._numbers, size)
        context_lens, starts, ends, sampled_rows = requests[:4]
        token_ids, positions, slots = tokens
        metadata = AttentionMetadata(
            slot_mapping=slots,
            block_tables=requests[NUM_REQUEST_COLUMNS:].T.int().contiguous(),
            context_lens=context_lens.int(),
            query_starts=torch.cat((starts[:1], ends)).int(),
            max_query_len=max(size, 2),
            max_context_len=self.max_model_len,
            padding_slot=self._first_padding_slot,
        )
        first_pushed = NUM_STEP_NUMBERS + self._num_request_numbers + NUM_TOKEN_COLUMNS * size
        return ModelInputs(
            token_ids,
            positions,
            metadata,
            sampled_rows[:num_sampled],
            self.sampling(num_sampled) if num_sampled else None,
            self._numbers[first_pushed:] if self._pushes else None,
        )

    def sampling(self, num_sampled: int | None = None) -> SamplingInputs:
        """Sampling parameters of the step's first last chunks, of as many as fit if not given; on the device alone."""
        columns = self._request_columns()[4:NUM_REQUEST_COLUMNS, :num_sampled]
        seeds, output_indices, temperatures = columns
        return SamplingInputs(temperatures.view(torch.float64).float(), seeds, output_indices)

    def step_numbers(self) -> torch.Tensor:
        """[3] int64: the numbers of the step as a whole."""
        return self._numbers[:NUM_STEP_NUMBERS]

    def sampled_rows(self) -> torch.Tensor:
        """[max_num_requests] int64: which token of the step each last chunk samples after."""
        return self._request_columns()[3]

    def num_rows(self) -> torch.Tensor:
        """[] int64: how many decode rows the step has, before the tokens of chunks."""
        return self._request_columns()[1, 0]

    def _request_columns(self) -> torch.Tensor:
        return self._views(self._numbers, 0)[0]

    def _views(self, numbers, size):  # type: ignore[no-untyped-def] # numpy and torch alike
        """[columns, max_num_requests] and [NUM_TOKEN_COLUMNS, size] views of an upload."""
        first = NUM_STEP_NUMBERS + self._num_request_numbers
        requests = numbers[NUM_STEP_NUMBERS:first].reshape(-1, self.max_num_requests)
        last = first + NUM_TOKEN_COLUMNS * size
        return requests, numbers[first:last].reshape(NUM_TOKEN_COLUMNS, size)
