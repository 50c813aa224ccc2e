"""Attention over a paged KV pool and the element-wise work around it: the interface and the backends behind it.

`resolve_backend` picks a backend and says why it passed over others. Backends are imported only when asked for, so
neither triton nor flash_attn needs to be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch

from nanovllm.errors import BackendUnavailableError
from nanovllm.utils.fp8 import ScaledTokens, ScaledWeight, parts_of


class RowField(IntEnum):
    """What the device stores of decoding requests, as rows of a [NUM_ROW_FIELDS, num_stored] int64 tensor."""

    LAST_TOKEN = 0
    POSITION = 1
    SEED = 2
    OUTPUT_INDEX = 3


NUM_ROW_FIELDS = len(RowField)

NO_FINITE_TOKEN = -1
"""Sampled where logits are not finite. The host ends the request; until then the device feeds token 0."""


@dataclass(frozen=True)
class LayerHooks:
    """What each layer in turn calls in a step; None for nothing to do.

    Attributes:
        after_store: called with the layer's view of the pool once the step's KV is stored there, before any of it is
            attended to.
        before_attend: called before chunks of prompts, but not decode rows, attend to what is in the pool, after
            `after_store`.
    """

    after_store: Callable[[torch.Tensor], None] | None = None
    before_attend: Callable[[], None] | None = None


NO_HOOKS = LayerHooks()


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step belong. B requests, T tokens in all, one after another.

    Attributes:
        slot_mapping: [T] int64, the pool slot of each token: block id * block size + offset in the block.
        block_tables: [B, max_blocks] int32, each request's blocks in token order; what lies beyond its context
            is never read.
        context_lens: [B] int32, tokens of each request up to and with this step's last.
        query_starts: [B + 1] int32, where each request's tokens begin in T.
        max_query_len: the largest number of tokens of one request in this step.
        max_context_len: the largest of `context_lens`, or a bound of it.
        work_split: the result of the backend's `split_work` for this step, None to have each layer compute it. It is
            computed from the other fields. Its kernel must not be the immediate predecessor of `attend` (overlapped
            launch).
        num_sms: how many SMs to spread attention over, None for all of the GPU.
        hooks: what each layer calls.
        decode: of a step with both parts, its decode rows, whose tokens come first in T; the other fields but
            `slot_mapping` are of the chunks then. It may have rows without context behind those that there are, up to
            T. None for a step with one part.
        decode_stream: a stream for the attention of these rows, beside that of the chunks; None to run one after the
            other.
        padding_slot: tokens with this slot or a later one fill the step up and belong to no request; None if there are
            none.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    max_query_len: int
    max_context_len: int
    work_split: torch.Tensor | None = None
    num_sms: int | None = None
    hooks: LayerHooks = NO_HOOKS
    decode: AttentionMetadata | None = None
    decode_stream: torch.cuda.Stream | None = None
    padding_slot: int | None = None

    @property
    def is_decode(self) -> bool:
        """Whether every request has exactly one token."""
        return self.max_query_len == 1


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of a layer of E experts, gated FFNs of which each token passes the `top_k` that its router chooses.

    The experts' weights are stacked by rows, one expert after another.

    Attributes:
        router: [E, hidden_size], in the type of the model.
        gate_up: [E * 2 * size, hidden_size]: of each expert the rows of gate, then those of up.
        down: [E * hidden_size, size].
        top_k: experts of a token: those with the largest probabilities, of equal ones the first.
        renormalizes: whether a token's probabilities of its experts are divided by their sum.
    """

    router: torch.Tensor
    gate_up: torch.Tensor | ScaledWeight
    down: torch.Tensor | ScaledWeight
    top_k: int
    renormalizes: bool

    @property
    def num_experts(self) -> int:
        return len(self.router)

    def of(self, expert: int) -> tuple[torch.Tensor | ScaledWeight, torch.Tensor | ScaledWeight]:
        """Views of one expert's gate and up, and of its down."""
        return self._rows_of(self.gate_up, expert), self._rows_of(self.down, expert)

    def _rows_of(self, weight: torch.Tensor | ScaledWeight, expert: int) -> torch.Tensor | ScaledWeight:
        per_expert = len(parts_of(weight)[0]) // self.num_experts
        rows = slice(expert * per_expert, (expert + 1) * per_expert)
        return weight.rows(rows) if isinstance(weight, ScaledWeight) else weight[rows]


class Kernels(Protocol):
    """The interface of a backend: stores and attends to paged KV, and does the work around it.

    `kv_cache` is one layer's view of the pool, [num_blocks, 2, num_kv_heads, block_size, head_dim]: keys at 0,
    values at 1. Block strides exceed the block's own size, since a block is contiguous over all layers.

    Where the pool is FP8 (e4m3), `kv_scales` are the layer's: [2, num_kv_heads] float32, of keys at 0, of values at 1.
    A number of the pool times its scale is the key's or value's. They are None for a pool of the model's type.
    """

    name: str
    is_capturable: bool
    """Whether steps can be captured in a CUDA graph: no value is read back to the host."""
    skips_empty_requests: bool
    """Whether `attend` writes nothing for requests without context."""

    def norm_rotate_store(
        self,
        qkv: torch.Tensor,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        eps: float,
        positions: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Norms and rotates the query and key heads of `qkv`, or does one of the two or neither, and stores keys and
        values in the pool.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim]: query, key and value heads, contiguous.
            query_weight, key_weight: [head_dim], of the RMSNorm over each head; None, both, for no norm.
            eps: of the norms.
            positions: [T] int64, rows of the tables.
            cos, sin: [max_positions, head_dim / 2] float32; pair (i, i + head_dim / 2) is rotated; None, both, for no
                rotation.
            kv_cache: the layer's view of the pool.
            slot_mapping: [T] int64, as in `AttentionMetadata`.
            kv_scales: of a pool in FP8. What is too large for its scale is stored as the largest number.

        Returns:
            The query heads, [T, num_heads, head_dim].
        """

    def split_work(self, metadata: AttentionMetadata, num_heads: int, kv_cache: torch.Tensor) -> torch.Tensor | None:
        """How `attend` divides a step's work among thread blocks, made once for all layers; None if it needs none.

        `kv_cache` is any layer's view of the pool, whose type and shape count, not what is stored there.
        """

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of `query`, [T, num_heads, head_dim], to each request's whole context; same shape out.

        The result is `out` if given, which is contiguous; its tokens before those of the first request stay as they
        are. `metadata.decode` is not looked at.
        """

    def linear(
        self,
        x: torch.Tensor | ScaledTokens,
        weight: torch.Tensor | ScaledWeight,
        bias: torch.Tensor | None,
        num_sms: int | None = None,
    ) -> torch.Tensor:
        """x W^T + b of [T, in_features] and [out_features, in_features]; [T, out_features].

        Where the weights are scaled, x is quantized by their format first, token by token, if it is not already.
        `num_sms` is how many SMs the current stream has, None for all of the GPU.
        """

    def norm_linear(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: tuple[torch.Tensor, float],
        weight: torch.Tensor | ScaledWeight,
        bias: torch.Tensor | None,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`linear` of the norm of `x + residual`, and that sum; `norm` is the weight and eps of `add_rms_norm`."""

    def norm_gated_linear(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: tuple[torch.Tensor, float],
        weight: torch.Tensor | ScaledWeight,
        bias: torch.Tensor | None,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor | ScaledTokens, torch.Tensor]:
        """`silu_and_mul` of what `norm_linear` gives, and the sum.

        Where the weights are scaled, the former may be quantized for a layer whose weights are scaled in the same way.
        """

    def norm_experts(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: tuple[torch.Tensor, float],
        experts: ExpertWeights,
        metadata: AttentionMetadata | None = None,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of the norm of `x + residual`, and that sum; [T, hidden_size] each.

        A token's result is the sum over its experts of down(silu(gate) * up) times the probability that the softmax of
        the router's outputs, in float32 over all experts, gives the expert. Where the weights are scaled, the inputs of
        gate and up, and those of down, are quantized by their format, token by token. Tokens that are padding by the
        `metadata` (None: none are) pass no expert: the result is 0.
        """

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm of `x + residual` over the last dimension of [T, size], computed in float32, and the sum itself."""

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 * size], gate first; [T, size]."""

    def sample_tokens(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        output_indices: torch.Tensor,
        first_token: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token id for each row of [B, n] logits, of the tokens from `first_token` on: [B] int64; and its score.

        The score, [B] float32, is the largest of the logits where the temperature ([B] float32) is 0, else the largest
        of logits / temperature plus `torch_reference.gumbel_noise` of the row's seed and output index ([B] int64 each),
        which draws from their softmax. A row with a NaN, or whose score is infinite, has no token: its id is
        NO_FINITE_TOKEN or another negative number, and its score is not finite.
        """

    def gather_rows(
        self,
        indices: torch.Tensor,
        fields: torch.Tensor,
        temperatures: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows of a decode step, gathered by their indices.

        Args:
            indices: [B] int64.
            fields: [NUM_ROW_FIELDS, num_stored] int64.
            temperatures: [num_stored] float32.
            block_tables: [num_stored, max_blocks] int32.
            block_size: tokens of a block.

        Returns:
            Fields [NUM_ROW_FIELDS, B], temperatures [B] and block tables [B, max_blocks] of the rows (what lies beyond
            the context may be anything), slot mapping [B] int64 and context lengths [B] int32, as in
            `AttentionMetadata`.
        """

    def advance_rows(
        self,
        indices: torch.Tensor,
        gathered: torch.Tensor,
        token_ids: torch.Tensor,
        fields: torch.Tensor,
        padding_row: int,
    ) -> None:
        """Makes `fields` what the next step is fed: the sampled [B] int64 tokens (0 for a negative one), a position on.

        The padding row, which `indices` may hold several times, stays at its first position.
        """


@dataclass(frozen=True)
class BackendRequirements:
    """What an engine needs of a backend; a `block_size` of None lets the backend choose."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    block_size: int | None = None
    has_scaled_weights: bool = False
    has_experts: bool = False
    has_fp8_kv: bool = False


@dataclass(frozen=True)
class ResolvedBackend:
    backend: Kernels
    block_size: int
    reason: str


_MODULES = {
    "triton": "nanovllm.kernels.triton_attention",
    "flash_attn": "nanovllm.kernels.flash_attn",
    "torch": "nanovllm.kernels.torch_reference",
}


BACKENDS = tuple(_MODULES)


def unsupported_reasons(name: str, needs: BackendRequirements) -> list[str]:
    """Every reason why backend `name` cannot serve `needs`; empty if it can."""
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        return [f"{error.name or name} cannot be imported ({error}); pip install {(error.name or name).split('.')[0]}"]
    return module.unsupported_reasons(needs)


def resolve_backend(name: str, needs: BackendRequirements) -> ResolvedBackend:
    """The attention backend `name`, or for `auto` the first that can serve: triton on a GPU, torch on a CPU.

    Raises:
        BackendUnavailableError: the named backend cannot serve; the message lists the reasons.
    """
    if name != "auto":
        reasons = unsupported_reasons(name, needs)
        if reasons:
            raise BackendUnavailableError(f"attention_backend={name!r} cannot serve here: {'; '.join(reasons)}")
        return _make(name, needs, "asked for")
    candidates = ("triton", "torch") if needs.device_type == "cuda" else ("torch",)
    passed_over: list[str] = []
    for candidate in candidates:
        reasons = unsupported_reasons(candidate, needs)
        if not reasons:
            because = f"the best for {needs.device_type}"
            return _make(candidate, needs, "; ".join([because, *passed_over]))
        passed_over.append(f"not {candidate}: {', '.join(reasons)}")
    raise BackendUnavailableError(f"no attention backend can serve here: {'; '.join(passed_over)}")


def _make(name: str, needs: BackendRequirements, reason: str) -> ResolvedBackend:
    module = importlib.import_module(_MODULES[name])
    return ResolvedBackend(module.Backend(), needs.block_size or module.DEFAULT_BLOCK_SIZE, reason)
