"""One prefill step on the device, in buffers with fixed addresses, so that a graph can be captured over them."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from nanovllm.engine.execution.model_inputs import ModelInputs
from nanovllm.engine.execution.prefill_layout import (
    NUM_REQUEST_COLUMNS,
    NUM_STEP_NUMBERS,
    NUM_TOKEN_COLUMNS,
    PrefillLayout,
)
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.sampler import SamplingInputs
from nanovllm.utils.device import Device, DoneEvent, Event

NUM_UPLOADS = 4
"""More than the steps that are in flight, so that a launch need not wait for the copy of an earlier one."""


class PrefillBuffers:
    """The upload of a step on the device, and its parts as the inputs of a pass.

    Args:
        device: where the buffers are.
        layout: how steps are laid out in them.
    """

    def __init__(self, device: Device, layout: PrefillLayout) -> None:
        self.device = device
        self.layout = layout
        self._numbers = torch.zeros(layout.size, dtype=torch.int64, device=device.torch_device)
        self._uploads: deque[tuple[torch.Tensor, Event]] = deque()
        """Pinned memory from which uploads are copied, and the end of the last copy from it."""
        for _ in range(NUM_UPLOADS if device.is_cuda else 0):
            pinned = torch.zeros(layout.size, dtype=torch.int64, device="cpu", pin_memory=True)
            self._uploads.append((pinned, DoneEvent()))

    def send_padding(self, size: int, *, num_rows: int = 0) -> None:
        """Makes the step on the device one of padding alone, as of `PrefillLayout.pack`."""
        self.send(self.layout.pack([], size, num_rows=num_rows))

    def send(self, numbers: np.ndarray) -> None:
        """Copies an upload of `PrefillLayout.pack` to the device, in one copy; on each rank."""
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
        requests, tokens = self.layout.views(self._numbers, size)
        context_lens, starts, ends, sampled_rows = requests[:4]
        token_ids, positions, slots = tokens
        metadata = AttentionMetadata(
            slot_mapping=slots,
            block_tables=requests[NUM_REQUEST_COLUMNS:].T.int().contiguous(),
            context_lens=context_lens.int(),
            query_starts=torch.cat((starts[:1], ends)).int(),
            max_query_len=max(size, 2),
            max_context_len=self.layout.max_model_len,
            padding_slot=self.layout.first_padding_slot,
        )
        first_pushed = NUM_STEP_NUMBERS + self.layout.num_request_numbers + NUM_TOKEN_COLUMNS * size
        return ModelInputs(
            token_ids,
            positions,
            metadata,
            sampled_rows[:num_sampled],
            self.sampling(num_sampled) if num_sampled else None,
            self._numbers[first_pushed:] if self.layout.pushes else None,
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
        return self.layout.views(self._numbers, 0)[0]
