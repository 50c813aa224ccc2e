"""Makes a model on a device and gives it its weights: read, copied from another device, or random."""

from __future__ import annotations

import dataclasses
import logging

import torch

from nanovllm.engine.execution.kv_pool import GIB, host_memory_bytes
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.errors import ModelLoadError
from nanovllm.kernels import Kernels
from nanovllm.layers.ranks import Ranks
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.decoder import CausalLM
from nanovllm.models.description import ModelDescription
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
        for scales, their_scales in zip(model.kv_scales(), weights_of.kv_scales(), strict=True):
            scales.copy_(their_scales)
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


def weight_bytes(
    model_class: type[CausalLM],
    config: ModelDescription,
    backend: Kernels,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
) -> int:
    """Memory that the weights of a model take, or a rank's part of them; nothing is allocated.

    One layer is looked at, all being alike: a config may name any number of layers, and each takes time to make.
    """
    one_layer = dataclasses.replace(config, num_hidden_layers=1)
    made = model_class(one_layer, backend, 1, dtype=dtype, device=torch.device("meta"), ranks=ranks)
    weights = made.checkpoint_tensors()
    in_layer = sum(weight.nbytes for name, weight in weights.items() if name.startswith("model.layers."))
    return sum(weight.nbytes for weight in weights.values()) + (config.num_hidden_layers - 1) * in_layer


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
    weights = weight_bytes(spec.model_class, spec.model_config, spec.attention.backend, spec.dtype, ranks)
    table = RotaryEmbedding(spec.model_config.rope, spec.max_model_len, torch.device("meta"))
    angles = table.cos.nbytes + table.sin.nbytes
    needed = weights + angles
    available = device.memory_info()[0] if device.is_cuda else host_memory_bytes()
    if needed > available:
        raise ModelLoadError(
            f"the weights take {weights / GIB:.2f} GiB and the rotary angles of max_model_len={spec.max_model_len} "
            f"{angles / GIB:.2f} GiB, {device} has {available / GIB:.2f} GiB free: "
            f"{(needed - available) / GIB:.2f} GiB are missing; free memory there, choose another device or lower "
            "max_model_len"
        )
