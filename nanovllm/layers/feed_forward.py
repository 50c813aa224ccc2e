"""The feed-forward part of a layer, which a model's description chooses and sizes. Knows nothing of attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nanovllm.kernels import AttentionMetadata, Kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.layers.ranks import Ranks, part_of
from nanovllm.utils.fp8 import Fp8Format
from nanovllm.utils.weight import Weight

LINEAR_LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class GatedFfnConfig:
    """A gated FFN, down(silu(gate(x)) * up(x)): SwiGLU (Shazeer, 2020, arXiv 2002.05202).

    Attributes:
        intermediate_size: outputs of gate and of up.
        gate_up_bias: whether both of them have a bias.
        down_bias: whether down has one.
    """

    intermediate_size: int
    gate_up_bias: bool = False
    down_bias: bool = False

    @property
    def divided(self) -> dict[str, int]:
        """Sizes that the number of ranks must divide, by name."""
        return {"FFN rows": self.intermediate_size}

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the linear layers that may be quantized, within the layer."""
        return LINEAR_LAYERS

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of the GEMMs that a token passes."""
        return 3 * hidden_size * self.intermediate_size

    def num_read(self, hidden_size: int, num_tokens: float) -> int:
        """Weights of the GEMMs that at least one of so many tokens passes: all of them."""
        return self.num_parameters(hidden_size)

    def num_unquantized(self, hidden_size: int) -> int:
        """Weights that are in the type of the model in any format: none."""
        return 0

    def make(
        self,
        hidden_size: int,
        backend: Kernels,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Fp8Format | None = None,
    ) -> GatedFfn:
        """The FFN of one layer, or this rank's part of it, with uninitialized weights."""
        return GatedFfn(self, hidden_size, backend, ranks, dtype=dtype, device=device, quantization=quantization)


class GatedFfn(nn.Module):
    """The gated FFN of one layer. Each rank has some rows of gate and up; an all-reduce adds up the ranks' outputs."""

    def __init__(
        self,
        config: GatedFfnConfig,
        hidden_size: int,
        backend: Kernels,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Fp8Format | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks
        rows = config.intermediate_size // ranks.size
        make = partial(Linear, backend=backend, dtype=dtype, device=device, quantization=quantization)
        self.gate_up_proj = make(hidden_size, [rows, rows], bias=config.gate_up_bias)
        # Only on rank 0, since the all-reduce must add the bias once.
        down_bias = config.down_bias and ranks.rank == 0
        self.down_proj = make(rows, [hidden_size], bias=down_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        norm: RMSNorm,
        num_sms: int | None = None,
        metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The FFN of the norm of `hidden + residual`, [T, hidden_size] each, and the sum."""
        activated, residual = self.gate_up_proj.forward_gated(hidden, residual, norm, num_sms)
        return self.ranks.all_reduce(self.down_proj(activated, num_sms)), residual

    def checkpoint_tensors(self) -> dict[str, Weight]:
        """The weights by their Hugging Face names within the layer."""
        gate, up, down = LINEAR_LAYERS
        return {
            **self.gate_up_proj.checkpoint_tensors([gate, up], part_of(self.ranks, 0)),
            **self.down_proj.checkpoint_tensors([down], part_of(self.ranks, 1)),
        }
