"""Tiny FP8 checkpoints on disk, in the forms that are served, and twins of them in transformers that compute the same.

The rule of the format is written here a second time, plainly, so that it is tested by something else than itself.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tests import tiny

BLOCK = 128
SIZES = {
    "vocab_size": 208,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
"""Whole blocks in all linear layers, on two ranks too."""

TOKEN_SCALES = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
CHANNEL_SCALES = {**TOKEN_SCALES, "dynamic": False, "strategy": "channel"}
CONFIGS: dict[str, dict[str, Any]] = {
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": CHANNEL_SCALES,
                "input_activations": TOKEN_SCALES,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    },
    "block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.1.mlp.gate"],
    },
}
SCALE_NAMES = {"channel": "weight_scale", "block": "weight_scale_inv"}


def quantized(x: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and float32 scales of blocks."""
    scales = []
    for some in x.detach().float().split(columns, dim=1):
        largest = some.abs().amax(dim=1)
        scales.append(torch.stack([of_rows.max() for of_rows in largest.split(rows)]) * (1.0 / 448.0))
    stacked = torch.stack(scales, dim=1)
    spread = torch.kron(stacked, torch.ones(rows, columns))[: x.shape[0], : x.shape[1]]
    return (x / spread).to(torch.float8_e4m3fn), stacked


def blocks_of(form: str, weight: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a block of a weight."""
    return (1, weight.shape[1]) if form == "channel" else (BLOCK, BLOCK)


def dequantized(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    spread = torch.kron(scales, torch.ones(rows, columns))[: values.shape[0], : values.shape[1]]
    return values.float() * spread


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.model.layers.named_modules() if isinstance(layer, nn.Linear)}


class TwinExperts(nn.Module):
    """The experts of a layer, in place of transformers', with quantized weights and inputs.

    Args:
        num_experts: of the layer.
        tensors: those of the checkpoint, in which the experts' become what is stored.
        prefix: of the names of the experts' tensors.
        form: of the checkpoint.
    """

    def __init__(self, num_experts: int, tensors: dict[str, torch.Tensor], prefix: str, form: str) -> None:
        super().__init__()
        self.form = form
        self.weights: list[dict[str, torch.Tensor]] = [{} for _ in range(num_experts)]
        for expert, name in itertools.product(range(num_experts), ("gate_proj", "up_proj", "down_proj")):
            layer = f"{prefix}.{expert}.{name}"
            size = blocks_of(form, tensors[f"{layer}.weight"])
            values, scales = quantized(tensors[f"{layer}.weight"], *size)
            scales = scales.bfloat16()
            tensors |= {f"{layer}.weight": values, f"{layer}.{SCALE_NAMES[form]}": scales}
            self.weights[expert][name] = dequantized(values, scales.float(), *size)

    def _times(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        size = (1, x.shape[1] if self.form == "channel" else BLOCK)
        return dequantized(*quantized(x, *size), *size) @ weight.T

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for expert, of_expert in enumerate(self.weights):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                x = hidden[tokens]
                gate, up = (self._times(x, of_expert[name]) for name in ("gate_proj", "up_proj"))
                results = self._times(nn.functional.silu(gate) * up, of_expert["down_proj"])
                output.index_add_(0, tokens, results * weights[tokens, places, None])
        return output


def write(folder: Path, form: str, *, seed: int = 5, **changes: Any) -> PreTrainedModel:
    """Writes a checkpoint; gives its twin, whose linear layers have these weights and quantize their inputs."""
    model = tiny.make_reference(seed, **{**SIZES, **changes})
    tiny.save(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[form]}), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    for name, layer in linear_layers(model).items():
        stored = f"model.layers.{name}.weight"
        size = blocks_of(form, layer.weight)
        values, scales = quantized(tensors[stored], *size)
        scales = scales.bfloat16()  # as published checkpoints have them
        tensors |= {stored: values, f"model.layers.{name}.{SCALE_NAMES[form]}": scales}
        layer.weight.data = dequantized(values, scales.float(), *size)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            prefix = f"model.layers.{index}.mlp.experts"
            layer.mlp.experts = TwinExperts(layer.mlp.experts.num_experts, tensors, prefix, form)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return quantizing_inputs(model, form)


def quantizing_inputs(model: PreTrainedModel, form: str) -> PreTrainedModel:
    """The model, with the inputs of its linear layers quantized token by token."""

    def quantize_input(layer: nn.Module, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        tokens = arguments[0].flatten(0, -2)
        size = (1, tokens.shape[1] if form == "channel" else BLOCK)
        return dequantized(*quantized(tokens, *size), *size).view(arguments[0].shape)

    for layer in linear_layers(model).values():
        layer.register_forward_pre_hook(quantize_input)
    return model
