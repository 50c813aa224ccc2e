"""Makes a model on a device and gives it its weights: read, copied from another device, or random."""

from __future__ import annotations

import logging

import torch

from nanovllm.engine.execution.kv_pool import GIB, host_memory_bytes
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.errors import ModelLoadError
from nanovllm.layers.ranks import Ranks
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.checkpoint import first_names
from nanovllm.utils.device import Device
from nanovllm.utils.loader import fill_randomly, load_weights

logger = logging.getLogger(__name__)


def load_model(spec: RunnerSpec, device: Device, ranks: Ranks, weights_of: CausalLM | None = None) -> CausalLM:
    """A rank's part of the model, with weights copied from `weights_of`, read from the checkpoint, or random.

    Raises:
        ModelLoadError: the weights cannot be loaded or do not fit.
    """
    _check_weights_fit(spec, device, ranks)
    model = _make_model(spec, device.torch_device, ranks)
    if weights_of is not None:
        theirs = weights_of.checkpoint_tensors()
        for name, weight in model.checkpoint_tensors().items():
            weight.copy_from(theirs[name])
    elif spec.load_format == "dummy":
        fill_randomly(model.checkpoint_tensors(), spec.seed)
    else:
        unused = load_weights(
            spec.folder,
            model.checkpoint_tensors(),
            model.ignored_checkpoint_tensors(),
            model.substitute_checkpoint_tensors(),
        )
        if unused and not ranks.rank:
            logger.warning("%s has tensors that no layer takes: %s", spec.folder, first_names(unused))
    return model


def _make_model(spec: RunnerSpec, device: torch.device, ranks: Ranks) -> CausalLM:
    return spec.model_class(
        spec.model_config,
        spec.attention.backend,
        spec.max_model_len,
        dtype=spec.dtype,
        device=device,
        ranks=ranks,
    )


def _check_weights_fit(spec: RunnerSpec, device: Device, ranks: Ranks) -> None:
    weights = _make_model(spec, torch.device("meta"), ranks).checkpoint_tensors()
    needed = sum(weight.nbytes for weight in weights.values())
    available = device.memory_info()[0] if device.is_cuda else host_memory_bytes()
    if needed > available:
        raise ModelLoadError(
            f"the weights take {needed / GIB:.2f} GiB, {device} has {available / GIB:.2f} GiB free: "
            f"{(needed - available) / GIB:.2f} GiB are missing; free memory there or choose another device"
        )
