"""The ceiling of everything that reads memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lib.ceilings import median_ms

READ_TILE = 8192


def streaming_bandwidth() -> float:
    """Bytes per second at which this GPU reads memory that is in no cache: 4 GiB of random numbers, once."""
    data = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_().view(torch.int32)
    largest = torch.empty(len(data) // READ_TILE, dtype=torch.int32, device="cuda")
    return data.nbytes / median_ms(lambda: _read[(len(largest),)](data, largest, TILE=READ_TILE, num_warps=8)) * 1e3


@triton.jit
def _read(data, largest, TILE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    tile = tl.program_id(0).to(tl.int64)
    tl.store(largest + tile, tl.max(tl.load(data + tile * TILE + tl.arange(0, TILE)), 0))
