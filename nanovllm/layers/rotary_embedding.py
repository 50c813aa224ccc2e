"""Rotary position embedding (Su et al., 2021): default, linear, YaRN and Llama 3 frequencies.

Tables of angles only; kernels rotate by them. A table belongs to one model on one device; layers are given it.
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
        factor: how much longer contexts are than in training (all but default).
        original_max_positions: context length in training (yarn, llama3).
        beta_fast, beta_slow: turns over the original context above which a pair is kept, below which it is
            interpolated (yarn).
        attention_factor: scale of the rotated vectors; None takes YaRN's 0.1 ln(factor) + 1.
        mscale, mscale_all_dim: coefficients in place of the 0.1 above, as a ratio of two such scales.
        truncate: whether the borders of YaRN's ramp are rounded to whole pairs.
        low_freq_factor, high_freq_factor: turns over the original context below which a pair is interpolated, above
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
        assert config.rope_type == "yarn", f"rope type {config.rope_type} was let through by the model's config"
        kept, scale = _yarn_kept_share(config), _yarn_attention_factor(config)
    return frequencies * kept + frequencies / config.factor * (1.0 - kept), scale


def _llama3_kept_share(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """How much of its trained frequency each pair keeps, by its turns over the original context; a ramp between.

    As Llama 3.1 was published (Grattafiori et al., 2024, arXiv 2407.21783); the figures are in its config.json.
    """
    turns = config.original_max_positions * frequencies / (2 * math.pi)
    return ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0.0, 1.0)


def _yarn_kept_share(config: RopeConfig) -> torch.Tensor:
    """How much of its trained frequency each pair keeps: 1 for fast pairs, 0 for slow ones, a ramp between.

    Peng et al., 2023 (arXiv 2309.00071), section 3.2.
    """

    def pair_with_turns(turns: float) -> float:
        wavelength = config.original_max_positions / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = pair_with_turns(config.beta_fast), pair_with_turns(config.beta_slow)
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
