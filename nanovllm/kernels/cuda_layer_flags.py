"""Launches the kernels of `cuda_layer_flags.cu`, which tell another GPU that a layer's KV has arrived in its memory."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from nanovllm.utils.nvrtc import Kernel, compile_source


def raise_flag(flags: torch.Tensor, numbers: torch.Tensor, layer: int) -> None:
    """Raises a layer's flag on another GPU, after the work before it on the current stream.

    Args:
        flags: [num_layers] int64 in the other GPU's memory, to which peer access is enabled.
        numbers: [3] int64 on the current device, the inputs of the step.
        layer: which flag.
    """
    _kernel("raise_flag", len(flags), numbers.device).launch(1, 1, [flags, numbers, layer], overlaps=False)


def wait_for_flag(
    flags: torch.Tensor,
    numbers: torch.Tensor,
    missed: torch.Tensor,
    arrived_ns: torch.Tensor,
    reports: torch.Tensor,
    given_up: torch.Tensor,
    layer: int,
    limit_ms: int,
) -> None:
    """Has the work behind it on the current stream wait for a layer's flag.

    Args:
        flags, numbers: as of `raise_flag`, both on the current device.
        missed: [1] int64 on the current device.
        arrived_ns: [num_layers] int64 on the current device.
        reports: [N, 2] int64 in pinned memory of the host.
        given_up: [1] int32 in pinned memory of the host: not 0 if nothing will come.
        layer: which flag.
        limit_ms: milliseconds after which the work goes on without it.
    """
    kernel = _kernel("wait_for_flag", len(flags), numbers.device)
    kernel.launch(1, 1, [flags, numbers, missed, arrived_ns, reports, given_up, layer, limit_ms], overlaps=False)


def note_stored(stored_ns: torch.Tensor, layer: int) -> None:
    """Notes when the work before it on the current stream had ended, in `stored_ns`, [num_layers] int64."""
    _kernel("note_stored", len(stored_ns), stored_ns.device).launch(1, 1, [stored_ns, layer], overlaps=False)


def report_waits(
    numbers: torch.Tensor, stored_ns: torch.Tensor, arrived_ns: torch.Tensor, reports: torch.Tensor
) -> None:
    """Reports how long a step has waited for flags after its own KV was stored."""
    kernel = _kernel("report_waits", len(stored_ns), numbers.device)
    kernel.launch(1, 1, [numbers, stored_ns, arrived_ns, reports], overlaps=False)


@functools.cache
def _kernel(name: str, num_layers: int, device: torch.device) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compiled(num_layers, f"sm_{major}{minor}"), name, 0)


@functools.cache
def compiled(num_layers: int, architecture: str) -> bytes:
    """The machine code; needs no GPU."""
    file = Path(__file__).with_suffix(".cu")
    source = f"#define NUM_LAYERS {num_layers}\n{file.read_text(encoding='utf-8')}"
    return compile_source(source, file.name, architecture)
