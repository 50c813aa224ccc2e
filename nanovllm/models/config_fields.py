"""Reads fields of a checkpoint's `config.json` as transformers understands them; refuses what would mean another model.

A field that is null is not one that is left out: what transformers refuses is refused.
"""

from __future__ import annotations

import logging
from typing import Any

from nanovllm.errors import ModelLoadError, short_repr
from nanovllm.layers.rotary_embedding import ROPE_TYPES, RopeConfig

logger = logging.getLogger(__name__)

DEFAULT_ROPE_THETA = 10000.0
ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
NOT_IN_ANY_FAMILY = ("attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size")
"""Fields of other families, which change what a model computes."""


def positive(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """A field that is a positive integer, the default if it is left out.

    Raises:
        ModelLoadError: it is something else.
    """
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ModelLoadError(f"config.json: {name}={short_repr(value)} is not a positive integer")
    return value


def number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    """A field that is a positive number, the default if it is left out; of a size whose products are numbers, too.

    Raises:
        ModelLoadError: it is something else.
    """
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-200 <= value <= 1e200:
        raise ModelLoadError(f"config.json: {name}={short_repr(value)} is not a positive number (1e-200 to 1e200)")
    return float(value)


def optional_number(config: dict[str, Any], name: str) -> float | None:
    """A field that is a positive number, None if it is null or left out.

    Raises:
        ModelLoadError: it is something else.
    """
    return None if config.get(name) is None else number(config, name)


def flag(config: dict[str, Any], name: str, *, default: bool = False) -> bool:
    """A field that is true or false, the default if it is left out.

    Raises:
        ModelLoadError: it is something else.
    """
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ModelLoadError(f"config.json: {name}={short_repr(value)} is not true or false")
    return value


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Refuses what no model of this package has.

    Raises:
        ModelLoadError: the config asks for it.
    """
    if config.get("per_layer_config"):
        raise ModelLoadError(
            f"per_layer_config={short_repr(config['per_layer_config'])} is not supported; only layers that are all "
            "alike are"
        )
    if config.get("transformers_weights") is not None:
        raise ModelLoadError(
            f"transformers_weights={short_repr(config['transformers_weights'])} is not supported; rename that file to "
            "model.safetensors and take the field out"
        )
    for name in NOT_IN_ANY_FAMILY:
        if config.get(name) is not None:
            raise ModelLoadError(
                f"{name}={short_repr(config[name])} is not supported; take the field out if the model was made without"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelLoadError(f"hidden_act={short_repr(config['hidden_act'])} is not supported; only 'silu' is")


def head_dim_or_share(config: dict[str, Any], *, may_be_null: bool = False) -> int:
    """`head_dim`, or, where it is left out, as much of `hidden_size` as a query head's share.

    Raises:
        ModelLoadError: it is no positive integer, or null where that may not be; or the others are none.
    """
    if "head_dim" not in config or (may_be_null and config["head_dim"] is None):
        hidden_size, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
        if hidden_size < heads:
            raise ModelLoadError(f"hidden_size={hidden_size} is below num_attention_heads={heads}; give head_dim")
        return hidden_size // heads
    return positive(config, "head_dim")


MOST_EXPERTS = 512
"""The most that a layer may have: the router's kernel has no shared memory for more."""


def number_of_experts(config: dict[str, Any], name: str, other_name: str, default: int) -> int:
    """How many experts a layer has: a field that goes by either of two names, the default if both are left out.

    Raises:
        ModelLoadError: it is no positive integer, above MOST_EXPERTS, or both fields are there and differ.
    """
    count = positive(config, name, positive(config, other_name, default))
    if other_name in config and positive(config, other_name) != count:
        raise ModelLoadError(
            f"config.json: {name}={count} and {other_name}={short_repr(config[other_name])} differ; leave one out"
        )
    if count > MOST_EXPERTS:
        raise ModelLoadError(
            f"config.json: {name}={count} is not supported; a layer has at most {MOST_EXPERTS} experts"
        )
    return count


def experts_per_token(config: dict[str, Any], num_experts: int, default: int) -> int:
    """`num_experts_per_tok`, the default if it is left out.

    Raises:
        ModelLoadError: it is no positive integer, or there are not as many experts.
    """
    count = positive(config, "num_experts_per_tok", default)
    if count > num_experts:
        raise ModelLoadError(f"config.json: num_experts_per_tok={count} is above the number of experts, {num_experts}")
    return count


def refuse_shared_experts(config: dict[str, Any]) -> None:
    """Refuses experts that all tokens pass, beside those that a router chooses.

    Raises:
        ModelLoadError: the config names some.
    """
    for name in ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"):
        if config.get(name):
            raise ModelLoadError(
                f"{name}={short_repr(config[name])} is not supported; only experts that a router chooses are"
            )


def window_of_all_layers(config: dict[str, Any], *, default: int | None) -> int | None:
    """`sliding_window`, the default where it is left out, None for no window.

    Raises:
        ModelLoadError: it is no positive integer.
    """
    return None if config.get("sliding_window", default) is None else positive(config, "sliding_window", default)


def refuse_window_from_layer(config: dict[str, Any]) -> None:
    """Refuses a window that the layers from `max_window_layers` on have, unless there is no such layer.

    Raises:
        ModelLoadError: there is one, or a field is of the wrong type.
    """
    first = config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise ModelLoadError(f"config.json: max_window_layers={short_repr(first)} is not an integer")
    if first < positive(config, "num_hidden_layers"):
        refuse_window(config, default=4096)
    else:
        flag(config, "use_sliding_window")


def refuse_window(config: dict[str, Any], *, default: int | None) -> None:
    """Refuses the window of layers that have it, unless `use_sliding_window` or `layer_types` says otherwise.

    Args:
        config: the object in `config.json`.
        default: the window of a config without `sliding_window`.

    Raises:
        ModelLoadError: they have a window, or a field is of the wrong type.
    """
    window = config.get("sliding_window", default)
    if flag(config, "use_sliding_window") and window is not None and config.get("layer_types") is None:
        raise ModelLoadError(
            f"use_sliding_window=true is not supported where layers have the window "
            f"(sliding_window={short_repr(window)}); only full attention is"
        )


def check_layer_types(config: dict[str, Any], num_layers: int) -> None:
    """Checks that all layers have full attention.

    Raises:
        ModelLoadError: some have not, or there are not as many as layers.
    """
    layer_types = config.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ModelLoadError(f"layer_types={short_repr(layer_types)} is not supported; only 'full_attention' is")
    if len(layer_types) != num_layers:
        raise ModelLoadError(
            f"config.json: layer_types={short_repr(layer_types)} are {len(layer_types)}, "
            f"num_hidden_layers={num_layers}; leave layer_types out, or give one for each layer"
        )


def rope_config(config: dict[str, Any], head_dim: int, max_positions: int, default_theta: float) -> RopeConfig:
    """The frequencies that a config asks for; `default_theta` is the base of one that has no `rope_theta`.

    Raises:
        ModelLoadError: a field is missing, of the wrong type, contradicts another or is not supported.
    """
    rope = _rope_fields(config, default_theta)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ModelLoadError(f"rope type {short_repr(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}")
    _warn_of_unused(rope, rope_type)
    theta = number(rope, "rope_theta")
    if theta <= 1.0:
        raise ModelLoadError(f"config.json: rope_theta={theta} is not above 1")
    if rope_type == "default":
        return RopeConfig(head_dim, theta)
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        if name in ROPE_FIELDS[rope_type] and name not in rope:
            raise ModelLoadError(f"rope type {rope_type!r} needs a {name!r}; the config has {short_repr(rope)}")
    factor = number(rope, "factor")
    if rope_type == "linear":
        return RopeConfig(head_dim, theta, "linear", factor)
    # The one beside the rope fields counts more than the one among them.
    original = positive(rope, "original_max_position_embeddings", max_positions)
    original = positive(config, "original_max_position_embeddings", original)
    if rope_type == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        if low >= high:
            raise ModelLoadError(f"config.json: low_freq_factor={low} is not below high_freq_factor={high}")
        return RopeConfig(
            head_dim,
            theta,
            "llama3",
            factor,
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeConfig(
        head_dim,
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=optional_number(rope, "beta_fast") or RopeConfig.beta_fast,
        beta_slow=optional_number(rope, "beta_slow") or RopeConfig.beta_slow,
        attention_factor=optional_number(rope, "attention_factor"),
        mscale=optional_number(rope, "mscale"),
        mscale_all_dim=optional_number(rope, "mscale_all_dim"),
        truncate=flag(rope, "truncate", default=True),
    )


def _rope_fields(config: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """`rope_parameters`, or `rope_scaling`, which takes their place, with the `rope_theta` that may be beside."""
    for name in ("rope_scaling", "rope_parameters"):
        if config.get(name) and not isinstance(config[name], dict):
            raise ModelLoadError(f"config.json: {name}={short_repr(config[name])} is not an object")
    scaling, parameters = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    rope = {"rope_theta": config.get("rope_theta", default_theta), **(scaling or parameters)}
    if scaling and "rope_theta" in parameters and parameters["rope_theta"] != rope["rope_theta"]:
        raise ModelLoadError(
            f"config.json: rope_scaling takes the place of rope_parameters, whose "
            f"rope_theta={short_repr(parameters['rope_theta'])} is then rope_theta={short_repr(rope['rope_theta'])}; "
            "put what rope_scaling says into rope_parameters, or the right rope_theta into rope_scaling"
        )
    by_layer_type = [name for name, value in rope.items() if isinstance(value, dict)]
    if by_layer_type:
        raise ModelLoadError(
            f"config.json: rope_parameters by layer type ({', '.join(by_layer_type)}) are not supported; "
            "write those of all layers"
        )
    for fields in (config, rope):
        if fields.get("partial_rotary_factor", 1.0) != 1.0:
            factor = short_repr(fields["partial_rotary_factor"])
            raise ModelLoadError(f"partial_rotary_factor={factor} is not supported; only 1.0 is")
    return rope


def _warn_of_unused(rope: dict[str, Any], rope_type: str) -> None:
    used = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | ROPE_FIELDS[rope_type]
    unused = [f"{name}={short_repr(value)}" for name, value in rope.items() if name not in used]
    if unused:
        logger.warning("config.json: rope type %r has no %s", rope_type, ", ".join(unused))
