"""Lets a kernel start while the one before it on its stream ends (programmatic dependent launch, sm_90 on).

Such a kernel calls `begin` before it reads what the kernel before it wrote, and before it writes at all. When it
starts, the kernel before it has passed its own `begin`, so all kernels before that one have ended: what they wrote, a
step's positions and block tables for example, may be read at once. Thread blocks that have nothing to do may end
without a `begin`, as long as one has something to do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@functools.cache
def is_sm_90_or_later(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def overlap(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the launch of a kernel."""
    overlaps = is_sm_90_or_later(device)
    return {"OVERLAPS": overlaps, "launch_pdl": overlaps}


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Waits until the kernel before this one has ended and its writes are there, then allows the next one to start."""
    if OVERLAPS:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
