"""The feed-forward part of a layer as experts, a few of which each token is routed to (mixture of experts).

Knows nothing of attention, nor how a step's tokens are sorted by expert, which is up to the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nanovllm.kernels import AttentionMetadata, ExpertWeights, Kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.layers.ranks import Ranks, part_of
from nanovllm.utils.fp8 import Fp8Format
from nanovllm.utils.weight import Weight


@dataclass(frozen=True)
class ExpertNames:
    """What a family's checkpoints call the parts of a layer's experts, within the layer.

    Attributes:
        block: the whole: `<block>.gate` is the router, `<block>.experts.<number>` an expert.
        gate, up, down: the linear layers of an expert.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts, gated FFNs of which a router chooses some for each token: sum of p * down(silu(gate(x)) * up(x)).

    p is the softmax of the router's outputs (Shazeer et al., 2017, arXiv 1701.06538; Qwen3, 2025, arXiv 2505.09388).

    Attributes:
        num_experts: of a layer.
        num_per_token: experts that a token passes, those with the largest p.
        intermediate_size: outputs of an expert's gate and of its up.
        renormalizes: whether a token's p are divided by their sum over its experts.
        names: those of checkpoints.
    """

    num_experts: int
    num_per_token: int
    intermediate_size: int
    renormalizes: bool
    names: ExpertNames = ExpertNames()

    @property
    def divided(self) -> dict[str, int]:
        """Sizes that the number of ranks must divide, by name."""
        return {"rows of an expert": self.intermediate_size}

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the linear layers that may be quantized, within the layer; the router is none of them."""
        one = (self.names.gate, self.names.up, self.names.down)
        return tuple(f"{self.names.block}.experts.{n}.{name}" for n in range(self.num_experts) for name in one)

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of the GEMMs that a token passes."""
        return self.num_unquantized(hidden_size) + self.num_per_token * self._one_expert(hidden_size)

    def num_read(self, hidden_size: int, num_tokens: float) -> int:
        """Weights of the GEMMs that at least one of so many tokens passes, expected of tokens whose experts are
        independent and uniform: num_experts * (1 - (1 - num_per_token / num_experts) ** num_tokens) experts."""
        share_unused = (1 - self.num_per_token / self.num_experts) ** num_tokens
        distinct = self.num_experts * (1 - share_unused)
        return self.num_unquantized(hidden_size) + round(distinct * self._one_expert(hidden_size))

    def num_unquantized(self, hidden_size: int) -> int:
        """Weights that are in the type of the model in any format: those of the router."""
        return self.num_experts * hidden_size

    def _one_expert(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.intermediate_size

    def make(
        self,
        hidden_size: int,
        backend: Kernels,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Fp8Format | None = None,
    ) -> Experts:
        """The experts of one layer, or this rank's part of each, with uninitialized weights."""
        return Experts(self, hidden_size, backend, ranks, dtype=dtype, device=device, quantization=quantization)


class Experts(nn.Module):
    """The experts of one layer. Each rank has the router, and of every expert some rows of gate and up; an all-reduce
    adds up the ranks' outputs."""

    def __init__(
        self,
        config: ExpertsConfig,
        hidden_size: int,
        backend: Kernels,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Fp8Format | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.ranks = ranks
        rows, count = config.intermediate_size // ranks.size, config.num_experts
        make = partial(Linear, backend=backend, bias=False, dtype=dtype, device=device)
        # Small, and where a token is routed to must not depend on how it is rounded: never quantized.
        self.router = make(hidden_size, [count])
        # Stacked by rows, these are what the kernels take; nothing calls them as layers.
        self.gate_up_proj = make(hidden_size, [rows, rows] * count, quantization=quantization)
        self.down_proj = make(rows, [hidden_size] * count, quantization=quantization)

    @property
    def weights(self) -> ExpertWeights:
        """This rank's weights, as the kernels take them."""
        router, config = self.router.weight, self.config
        assert isinstance(router, torch.Tensor), "the router is not quantized"
        return ExpertWeights(
            router, self.gate_up_proj.weight, self.down_proj.weight, config.num_per_token, config.renormalizes
        )

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        norm: RMSNorm,
        num_sms: int | None = None,
        metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of the norm of `hidden + residual`, [T, hidden_size] each, and the sum.

        `metadata` says which of the tokens are padding, None if none is.
        """
        weights = (norm.weight, norm.eps)
        output, residual = self.backend.norm_experts(hidden, residual, weights, self.weights, metadata, num_sms)
        return self.ranks.all_reduce(output), residual

    def checkpoint_tensors(self) -> dict[str, Weight]:
        """The weights by their Hugging Face names within the layer."""
        names = self.config.names
        experts = [f"{names.block}.experts.{number}" for number in range(self.config.num_experts)]
        gate_up = [f"{expert}.{name}" for expert in experts for name in (names.gate, names.up)]
        down = [f"{expert}.{names.down}" for expert in experts]
        return {
            **self.router.checkpoint_tensors([f"{names.block}.gate"], None),
            **self.gate_up_proj.checkpoint_tensors(gate_up, part_of(self.ranks, 0)),
            **self.down_proj.checkpoint_tensors(down, part_of(self.ranks, 1)),
        }
