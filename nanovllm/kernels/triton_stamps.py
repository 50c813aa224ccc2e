"""When and where a stream runs: reads the GPU's own clock, and SM ids, on the stream, in CUDA graphs too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

NUM_PROGRAMS = 1024


def stamp(stamps: torch.Tensor, place: int) -> None:
    """Writes the time in nanoseconds to `stamps[place]`, int64 on the current device, when the stream gets there."""
    _stamp_kernel[(1,)](stamps, place, num_warps=1)


def sms_of_streams(streams: Sequence[torch.cuda.Stream], *, captured: bool) -> list[set[int]]:
    """The SMs that each of some streams of the current device runs on, found by a kernel, in a graph if `captured`."""
    notes = [torch.full((NUM_PROGRAMS,), -1, dtype=torch.int32, device="cuda") for _ in streams]

    def note() -> None:
        for stream, sms in zip(streams, notes, strict=True):
            with torch.cuda.stream(stream):
                _note_sm_kernel[(NUM_PROGRAMS,)](sms)

    torch.cuda.synchronize()
    note()
    torch.cuda.synchronize()
    if captured:
        graph, capturing = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=capturing):
            for stream in streams:
                stream.wait_stream(capturing)
            note()
            for stream in streams:
                capturing.wait_stream(stream)
        for sms in notes:
            sms.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
    return [set(sms.tolist()) for sms in notes]


@triton.jit
def _note_sm_kernel(sms):
    """Each program notes its SM, and runs long enough for the others to need other SMs."""
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    total = 0.0
    for turn in range(2000):
        total = total * 1.0001 + turn
    tl.store(sms + tl.program_id(0), sm + tl.where(total < -1.0, 1, 0))


@triton.jit(do_not_specialize=["place"])
def _stamp_kernel(stamps, place):
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(stamps + place, now)
