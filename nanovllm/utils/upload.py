"""Copies host tensors, such as those of a mapped file, to a GPU at the rate of its link."""

from __future__ import annotations

from types import TracebackType

import torch

BUFFER_BYTES = 16 * 1024**2
NUM_BUFFERS = 3
"""One is filled while the link takes the contents of the others."""


class Upload:
    """Copies of tensors into one device's memory, which are done when the `with` block ends.

    The driver takes memory that is not pinned through buffers of its own, by one thread, at a sixth of the link's
    rate. Here all of torch's threads fill pinned buffers, one after another, while the GPU copies those before.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._buffers: list[_Buffer] = []
        self._next = 0

    def __enter__(self) -> Upload:
        if self._device.type == "cuda":
            self._buffers = [_Buffer(self._buffer_bytes, self._device) for _ in range(NUM_BUFFERS)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Also after an error: a buffer may not be freed while the GPU reads it.
        for buffer in self._buffers:
            buffer.wait()

    def copy(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Copies values into a tensor of their shape on the device, and converts them to its type."""
        rows_per_piece = self._buffer_bytes // max(1, target[:1].nbytes) if target.dim() else 0
        if not self._buffers or not rows_per_piece:
            target.copy_(values)
            return
        for start in range(0, len(target), rows_per_piece):
            rows = slice(start, start + rows_per_piece)
            self._buffers[self._next].send(values[rows], target[rows])
            self._next = (self._next + 1) % NUM_BUFFERS


class _Buffer:
    """Pinned memory, and the end of the copy out of it.

    Args:
        num_bytes: its size.
        device: what is copied to, in its current stream.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._stream = torch.cuda.current_stream(device)
        self._sent = torch.cuda.Event()

    def send(self, values: torch.Tensor, target: torch.Tensor) -> None:
        self.wait()
        staged = self._bytes[: target.nbytes].view(target.dtype).view(target.shape)
        staged.copy_(values)
        target.copy_(staged, non_blocking=True)
        self._sent.record(self._stream)

    def wait(self) -> None:
        """Waits for the end of the last copy; there need not have been one."""
        self._sent.synchronize()
