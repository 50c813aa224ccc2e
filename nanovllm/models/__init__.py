"""Architecture names, as `config.json` gives them, and the classes that serve them."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelLoadError, short_repr
from nanovllm.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

MODEL_CLASSES: dict[str, type[Qwen3ForCausalLM]] = {
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3Model": Qwen3ForCausalLM,  # the base model alone, which holds all weights where embeddings are tied
}
MODEL_TYPES: dict[str, type[Qwen3ForCausalLM]] = {"qwen3": Qwen3ForCausalLM}


def resolve_model(config: dict[str, Any]) -> tuple[type[Qwen3ForCausalLM], Qwen3Config]:
    """The class and the parsed config of a checkpoint's `config.json`.

    Raises:
        ModelLoadError: the architecture or the model type is not supported, they contradict each other, or the config
            lacks or contradicts something else.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and name in MODEL_CLASSES:
            # This is what transformers goes by.
            if not isinstance(model_type, str) or MODEL_TYPES.get(model_type) is not MODEL_CLASSES[name]:
                raise ModelLoadError(
                    f"model_type={short_repr(model_type)} with architectures={short_repr(architectures)} is not "
                    f"supported; supported: {', '.join(MODEL_TYPES)}"
                )
            return MODEL_CLASSES[name], Qwen3Config.from_dict(config)
    raise ModelLoadError(
        f"architectures={short_repr(architectures)} is not supported; supported: {', '.join(MODEL_CLASSES)}"
    )
