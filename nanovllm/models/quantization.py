"""Reads how a checkpoint has its linear layers quantized, and whether it has scales of KV: `quantization_config` of its
`config.json`.

What is not served is refused by name. Knows nothing of how quantized layers compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ModelLoadError, short_repr
from nanovllm.utils.fp8 import Fp8Format

BLOCK = 128
QUANTIZATIONS = {"fp8": Fp8Format()}
"""Formats that weights in a wide type can be quantized to as they are loaded, by the name of the option."""
SERVED = (
    "served are FP8 weights with dynamic scales of activations: of compressed-tensors, a scale for each channel and "
    f"token, and of quant_method 'fp8' with weight_block_size [{BLOCK}, {BLOCK}]; and, of compressed-tensors, scales "
    "of FP8 KV for each layer (kv_cache_scheme by 'tensor'); or pass a checkpoint in float32, float16 or bfloat16, "
    "with quantization='fp8' if it is to be quantized as it is loaded"
)
ATTENTION_LAYERS = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o"))
CHANNEL_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
TOKEN_INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
KV_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}


def stored_format(config: dict[str, Any], num_layers: int, ffn_layers: tuple[str, ...]) -> Fp8Format | None:
    """The format of the linear layers' weights in the checkpoint; None if they are in a wide type.

    Args:
        config: the object in `config.json`.
        num_layers: of the model.
        ffn_layers: names of a layer's linear layers that are not attention's.

    Raises:
        ModelLoadError: it is none that is served, or some of these layers are not quantized.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise _refused("is not an object", quantization)
    method = quantization.get("quant_method")
    layers = _LinearLayers(num_layers, ATTENTION_LAYERS + ffn_layers)
    if method == "compressed-tensors":
        return _compressed_tensors(quantization, layers)
    if method == "fp8":
        return _fp8(quantization, layers)
    raise _refused(f"has quant_method={short_repr(method)}, which is not supported", quantization)


@dataclass(frozen=True)
class _LinearLayers:
    """The linear layers of a decoder, that have the same names in each of its layers."""

    num_layers: int
    names: tuple[str, ...]

    def matched(self, text: str, *, at_end: bool) -> str | None:
        """The first whose name has this text in it, or at its end; None for none. No pattern is run."""
        layers = (f"model.layers.{index}.{name}" for index in range(self.num_layers) for name in self.names)
        return next((layer for layer in layers if (layer.endswith(text) if at_end else text in layer)), None)

    def left_out(self, part: str) -> str | None:
        """The first whose name has these components side by side; None if there is none."""
        components = part.strip(".").split(".")
        numbers = (int(one) for one in components if one.isdecimal() and len(one) < 10)
        index = next((number for number in numbers if number < self.num_layers), 0)
        layers = (f"model.layers.{index}.{name}" for name in self.names)
        return next((layer for layer in layers if f".{'.'.join(components)}." in f".{layer}."), None)


def has_kv_scales(config: dict[str, Any]) -> bool:
    """Whether the checkpoint has scales of keys and values in FP8, one of each for a layer.

    Args:
        config: the object in `config.json`.

    Raises:
        ModelLoadError: it has others.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return False
    if not quantization.get("kv_cache_scheme"):
        return False
    _check_scheme(quantization["kv_cache_scheme"], "kv_cache_scheme", KV_CACHE, quantization)
    return True


def _compressed_tensors(quantization: dict[str, Any], layers: _LinearLayers) -> Fp8Format | None:
    sparsity = quantization.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise _refused(f"has sparsity_config={short_repr(sparsity)}, which is not supported", quantization)
    if quantization.get("transform_config"):
        transform = short_repr(quantization["transform_config"])
        raise _refused(f"has transform_config={transform}, which is not supported", quantization)
    groups = quantization.get("config_groups")
    if groups in (None, {}) and has_kv_scales({"quantization_config": quantization}):
        return None  # nothing but KV is quantized
    if not isinstance(groups, dict) or len(groups) != 1:
        raise _refused("does not have one of config_groups", quantization)
    (group,) = groups.values()
    if not isinstance(group, dict) or group.get("targets") != ["Linear"]:
        raise _refused("does not target all linear layers, 'Linear'", quantization)
    for name, served in (("weights", CHANNEL_WEIGHTS), ("input_activations", TOKEN_INPUTS)):
        _check_scheme(group.get(name), name, served, quantization)
    if group.get("output_activations") is not None:
        outputs = short_repr(group["output_activations"])
        raise _refused(f"has output_activations={outputs}, which is not supported", quantization)
    if quantization.get("quantization_status", "compressed") != "compressed":
        status = short_repr(quantization["quantization_status"])
        raise _refused(f"has quantization_status={status}, which is not supported", quantization)
    _check_all_quantized(quantization, "ignore", layers)
    return Fp8Format(scale_name="weight_scale")


def _check_scheme(scheme: Any, name: str, served: dict[str, Any], quantization: dict[str, Any]) -> None:
    """Checks that the fields of a scheme are those that are served."""
    if not isinstance(scheme, dict):
        raise _refused(f"has {name}={short_repr(scheme)}, which is not supported", quantization)
    for field, value in served.items():
        found = scheme.get(field, False if field == "dynamic" else None)
        if found != value:
            raise _refused(f"has {field}={short_repr(found)} of {name}, which is not supported", quantization)


def _fp8(quantization: dict[str, Any], layers: _LinearLayers) -> Fp8Format:
    served = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    for name, value in served.items():
        found = quantization.get(name, None if name == "weight_block_size" else value)
        if found != value:
            raise _refused(f"has {name}={short_repr(found)}, which is not supported", quantization)
    for name in ("modules_to_not_convert", "ignored_layers"):
        _check_all_quantized(quantization, name, layers)
    return Fp8Format(BLOCK, "weight_scale_inv")


def _check_all_quantized(quantization: dict[str, Any], field: str, layers: _LinearLayers) -> None:
    """Checks that no linear layer of the decoder is among those that are left as they are."""
    names = quantization.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refused(f"has {field}={short_repr(names)}, which is not a list of names", quantization)
    for name in names:
        if name.startswith("re:"):
            plain = name.removeprefix("re:").removeprefix("^").removesuffix("$").removeprefix(".*")
            if not plain.replace("_", "").replace(r"\.", "").replace(".", "").isalnum():
                raise _refused(f"has the pattern {short_repr(name)} in {field}, which is not supported", quantization)
            left_out = layers.matched(plain.replace("\\", ""), at_end=name.endswith("$"))
        else:
            left_out = layers.left_out(name)
        if left_out is not None:
            raise _refused(
                f"leaves {left_out} as it is ({short_repr(name)} in {field}), which is not supported", quantization
            )


def _refused(why: str, quantization: Any) -> ModelLoadError:
    return ModelLoadError(f"config.json: quantization_config {why}; {SERVED}; it is {short_repr(quantization)}")
