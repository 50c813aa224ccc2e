"""The families of models that are served, by `model_type` and by architecture, as `config.json` names them."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelLoadError, short_repr
from nanovllm.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, smollm3
from nanovllm.models.decoder import CausalLM
from nanovllm.models.description import ModelDescription

FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    smollm3.FAMILY,
)
BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}


def resolve_model(config: dict[str, Any]) -> tuple[type[CausalLM], ModelDescription]:
    """The class that serves a checkpoint, and what its `config.json` describes.

    Raises:
        ModelLoadError: the architecture or the model type is not supported, they contradict each other, or the config
            lacks or contradicts something else.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and name in BY_ARCHITECTURE:
            family = BY_ARCHITECTURE[name]
            # This is what transformers goes by.
            if model_type != family.model_type:
                raise ModelLoadError(
                    f"model_type={short_repr(model_type)} with architectures={short_repr(architectures)} is not "
                    f"supported; supported: {', '.join(family.model_type for family in FAMILIES)}"
                )
            return CausalLM, family.read(config)
    raise ModelLoadError(
        f"architectures={short_repr(architectures)} is not supported; supported: {', '.join(BY_ARCHITECTURE)}"
    )
