"""Architecture names, as `config.json` gives them, and the classes that serve them."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelLoadError, shown
from nanovllm.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

MODEL_CLASSES: dict[str, type[Qwen3ForCausalLM]] = {"Qwen3ForCausalLM": Qwen3ForCausalLM}


def resolve_model(config: dict[str, Any]) -> tuple[type[Qwen3ForCausalLM], Qwen3Config]:
    """The class and the parsed config of a checkpoint's `config.json`.

    Raises:
        ModelLoadError: the architecture is not supported, or the config lacks or contradicts something.
    """
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and name in MODEL_CLASSES:
            return MODEL_CLASSES[name], Qwen3Config.from_dict(config)
    raise ModelLoadError(
        f"architectures={shown(architectures)} is not supported; supported: {', '.join(MODEL_CLASSES)}"
    )
