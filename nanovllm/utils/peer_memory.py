"""GPU memory that other processes of the host may write to (CUDA IPC)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nanovllm.utils.cuda_driver import call_driver


class PeerMemory:
    """Memory of the current device, zeroed. Any thread may close it, whatever device is current there.

    Raises:
        BackendUnavailableError: the driver refuses, as it may within containers.
    """

    def __init__(self, num_bytes: int) -> None:
        self._opened: list[int] = []
        torch.cuda.synchronize()  # makes the device's context
        self._context = call_driver("cuCtxGetCurrent")
        self.address = int(call_driver("cuMemAlloc", num_bytes))
        call_driver("cuMemsetD8", self.address, 0, num_bytes)
        torch.cuda.synchronize()

    @property
    def handle(self) -> str:
        """The handle by which another process opens this memory."""
        return bytes(call_driver("cuIpcGetMemHandle", self.address).reserved).hex()

    def open(self, handle: str) -> int:
        """Maps another process's memory; its address for kernels of this process, until `close` or `close_others`.

        Raises:
            BackendUnavailableError: the driver refuses.
        """
        from cuda.bindings import driver

        named = driver.CUipcMemHandle()
        named.reserved = bytes.fromhex(handle)
        flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        address = int(call_driver("cuIpcOpenMemHandle", named, flag.value))
        self._opened.append(address)
        return address

    def close_others(self) -> None:
        """Unmaps other processes' memory, which nothing here may be using any more."""
        with self._in_context():
            for address in self._opened:
                call_driver("cuIpcCloseMemHandle", address)
        self._opened.clear()

    def close(self) -> None:
        """Unmaps other processes' memory and frees this one, which no process may have open."""
        self.close_others()
        with self._in_context():
            call_driver("cuMemFree", self.address)

    @contextlib.contextmanager
    def _in_context(self) -> Iterator[None]:
        """Makes the device's context current; a thread that has used no device yet has none."""
        call_driver("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            call_driver("cuCtxPopCurrent")
