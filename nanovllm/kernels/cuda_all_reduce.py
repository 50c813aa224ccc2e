"""All-reduce among GPUs that write into each other's memory, in CUDA C++ for sm_90 and later.

A decode step has two all-reduces per layer. For the hidden states of one token NCCL takes 7 us and these kernels, in
`cuda_all_reduce.cu`, take 2. The caller makes the tensors' device the current one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from nanovllm.errors import BackendUnavailableError
from nanovllm.utils.nvrtc import Kernel, compile_source
from nanovllm.utils.peer_memory import PeerMemory

NUM_THREADS = 256
MAX_BLOCKS = 256
PIECE_BYTES = 16
NUM_PIECES = 4
"""Pieces that a thread adds up in the plain protocol."""
MAX_LL_BYTES = 2**19
MAX_BYTES_SENT = NUM_THREADS * MAX_BLOCKS * NUM_PIECES * PIECE_BYTES
"""Maximum bytes sent to all other ranks together; NCCL, which sends each number once, takes larger tensors."""
LL, PLAIN = "all_reduce_ll", "all_reduce_plain"
NOTHING = "-"
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

Exchange = Callable[[str], list[str]]


class PeerAllReduce:
    """All-reduce of this rank and its peers, processes of this host, which all call the same in the same order.

    Args:
        rank, size: this rank, and the number of ranks.
        exchange: gathers a text from each rank, by rank.

    Raises:
        BackendUnavailableError: some rank cannot do it; all ranks raise it then.
    """

    def __init__(self, rank: int, size: int, exchange: Exchange) -> None:
        self._rank, self._size = rank, size
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._given_up = torch.zeros(
            1, dtype=torch.int32, device="cpu", pin_memory=True
        )  # kernels look at the host's memory
        self._rounds = torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=self._device)
        self._inbox: PeerMemory | None = None
        handle, failure = NOTHING, NOTHING
        try:
            _kernel(LL, size, rank, torch.bfloat16, self._device)
            bytes_of_block = 2 * NUM_THREADS * (2 + NUM_PIECES) * PIECE_BYTES + 4
            self._inbox = PeerMemory(size * MAX_BLOCKS * bytes_of_block)
            handle = self._inbox.handle
        except BackendUnavailableError as error:
            failure = str(error)
        handles = exchange(handle)
        if NOTHING not in handles:
            try:
                self._inboxes = self._opened(handles)
            except BackendUnavailableError as error:
                failure = str(error)
        failures = {said for said in exchange(failure) if said != NOTHING}  # nobody writes before all are here
        if failures:
            if self._inbox is not None:
                self._inbox.close_others()
            exchange("closed")  # nobody has this one's open any more
            self.close()
            raise BackendUnavailableError("; ".join(sorted(failures)))

    def can_serve(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce` is for this contiguous tensor."""
        is_small = (self._size - 1) * x.nbytes <= MAX_BYTES_SENT
        return is_small and x.dtype in KINDS and x.nbytes % PIECE_BYTES == x.data_ptr() % PIECE_BYTES == 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in the place of this one; every rank gets the same bits."""
        name, at_a_time = (LL, 1) if x.nbytes <= MAX_LL_BYTES else (PLAIN, NUM_PIECES)
        num_pieces = x.nbytes // PIECE_BYTES
        num_blocks = -(-num_pieces // (NUM_THREADS * at_a_time))
        kernel = _kernel(name, self._size, self._rank, x.dtype, self._device)
        kernel.launch(num_blocks, NUM_THREADS, [x, self._inboxes, self._rounds, self._given_up, num_pieces])
        return x

    def give_up(self) -> None:
        """Ends kernels that wait for a rank that is gone, within a millisecond each; later results mean nothing."""
        self._given_up[0] = 1

    def close(self) -> None:
        """Frees the inbox. No all-reduce may be in flight, on any rank."""
        if self._inbox is not None:
            self._inbox.close()

    def _opened(self, handles: list[str]) -> torch.Tensor:
        """[size] int64 addresses of all inboxes."""
        assert self._inbox is not None, "it has a handle"
        inbox = self._inbox
        places = [inbox.address if rank == self._rank else inbox.open(handle) for rank, handle in enumerate(handles)]
        inboxes = torch.tensor(places, dtype=torch.int64, device=self._device)
        torch.cuda.synchronize()
        return inboxes


@functools.cache
def _kernel(name: str, size: int, rank: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        raise BackendUnavailableError(f"cuda_all_reduce.cu needs sm_90 or later, {device} is sm_{major}{minor}")
    return Kernel(_compiled(size, rank, dtype, f"sm_{major}{minor}"), name, 0)


@functools.cache
def _compiled(size: int, rank: int, dtype: torch.dtype, architecture: str) -> bytes:
    file = Path(__file__).with_suffix(".cu")
    constants = {
        "RANKS": size,
        "RANK": rank,
        "THREADS": NUM_THREADS,
        "PIECES": NUM_PIECES,
        "MAX_BLOCKS": MAX_BLOCKS,
        "KIND": KINDS[dtype],
    }
    defined = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return compile_source(defined + file.read_text(encoding="utf-8"), file.name, architecture)
