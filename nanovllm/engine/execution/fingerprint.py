"""What a measured time holds for: a GPU, its driver, a model and how it is run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.utils.device import Device, driver_version
from nanovllm.version import __version__


def fingerprint(spec: RunnerSpec, device: Device) -> dict[str, Any]:
    """All that the time of a step depends on, but for the step; as JSON takes it."""
    return {
        "gpu": torch.cuda.get_device_name(device.index) if device.is_cuda else "cpu",
        "driver": driver_version(),
        "nanovllm": __version__,
        "torch": torch.__version__,
        "model": repr(dataclasses.asdict(spec.model_config)),
        "dtype": str(spec.dtype),
        "attention_backend": spec.attention.backend.name,
        "kvcache_block_size": spec.attention.block_size,
        "max_model_len": spec.max_model_len,
        "enforce_eager": spec.enforce_eager,
    }
