"""Rotary position embedding (Su et al., 2021): default, linear, YaRN and Llama 3 frequencies.

Only makes tables of cosines and sines; kernels rotate by them. One table serves all layers of a model on a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """The frequencies of a checkpoint.

    Attributes:
        head_dim: dimensions that are rotated, in pairs (i, i + head_dim / 2).
        theta: base of the geometric series of frequencies.
        rope_type: one of `ROPE_TYPES`.
        factor: ratio of the extended context length to that of training (all but default).
        original_max_positions: context length in training (yarn, llama3).
        beta_fast, beta_slow: rotations over the original context above which a pair is kept, below which it is
            interpolated (yarn).
        attention_factor: scale of the rotated vectors; None takes YaRN's 0.1 ln(factor) + 1 (yarn).
        mscale, mscale_all_dim: if both are set and `attention_factor` is not, the scale is the ratio of
            0.1 mscale ln(factor) + 1 to the same with `mscale_all_dim` (yarn).
        truncate: whether both ends of YaRN's ramp are rounded to whole pairs (yarn).
        low_freq_factor, high_freq_factor: rotations over the original context below which a pair is interpolated, above
            which it is kept (llama3).
    """

    head_dim: int
    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


class RotaryEmbedding:
    """A table of cosines and sines, float32 [max_positions, head_dim / 2] each; on the meta device without values."""

    def __init__(self, config: RopeConfig, max_positions: int, device: torch.device) -> None:
        if device.type == "meta":  # of which there may be too many for any machine
            self.cos = self.sin = torch.empty(max_positions, config.head_dim // 2, device=device)
            return
        frequencies, scale = inverse_frequencies(config)
        # In float32, as trained models have it: positions times frequencies, then cosine and sine.
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device="cpu"), frequencies)
        self.cos = (angles.cos() * scale).to(device)
        self.sin = (angles.sin() * scale).to(device)


def inverse_frequencies(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, float32 [head_dim / 2], and the scale of the rotated vectors."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.theta**exponents
    if config.rope_type == "default":
        return frequencies, 1.0
    if config.rope_type == "linear":
        return frequencies / config.factor, 1.0
    if config.rope_type == "llama3":
        kept, scale = _llama3_kept_share(config, frequencies), 1.0
    else:
        assert config.rope_type == "yarn", f"rope type {config.rope_type} was not refused by `rope_config`"
        kept, scale = _yarn_kept_share(config), _yarn_attention_factor(config)
    return frequencies * kept + frequencies / config.factor * (1.0 - kept), scale


def _llama3_kept_share(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Share of its trained frequency that each pair keeps: 0 below `low_freq_factor` rotations, 1 above the high one.

    From Llama 3.1 (Grattafiori et al., 2024, arXiv 2407.21783); its config.json has the factors.
    """
    num_rotations = config.original_max_positions * frequencies / (2 * math.pi)
    return ((num_rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(
        0.0, 1.0
    )


def _yarn_kept_share(config: RopeConfig) -> torch.Tensor:
    """Share of its trained frequency that each pair keeps: 1 for fast pairs, 0 for slow ones, a ramp between them.

    Peng et al., 2023 (arXiv 2309.00071), section 3.2.
    """

    def pair_with_rotations(num_rotations: float) -> float:
        wavelength = config.original_max_positions / (num_rotations * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = pair_with_rotations(config.beta_fast), pair_with_rotations(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low or 0.001
    ramp = (torch.arange(config.head_dim // 2, dtype=torch.float32, device="cpu") - low) / width
    return 1.0 - ramp.clamp(0.0, 1.0)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def scale(coefficient: float) -> float:
        return 1.0 if config.factor <= 1.0 else 0.1 * coefficient * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)
