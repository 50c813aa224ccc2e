"""The scales of KV in FP8 where the checkpoint has none: found once, by a prompt of fixed tokens, at the start.

They depend on the weights alone, so that what is stored in a block means the same in any step, on any card, and again
after a preemption; nothing has to be stored twice, as it would if they came from the first requests.
"""

from __future__ import annotations

import logging

import torch

from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.execution.kv_pool import make_kv_pool
from nanovllm.errors import ModelLoadError
from nanovllm.kernels import AttentionMetadata, LayerHooks
from nanovllm.layers.attention import KV_SCALE_NAMES
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.fp8 import LARGEST

logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 512
"""Tokens of the prompt, drawn at random from the whole vocabulary; fewer if requests may not be as long."""
CALIBRATION_SEED = 0
MARGIN = 4.0
"""How much larger than in this prompt keys and values may be before they are stored as the largest number there is.

Text has up to twice the largest of random tokens (SmolLM2-135M). A margin costs no accuracy, since FP8 has exponents:
with this one, and a power of two, the prompt's largest number is still 3,600 times the smallest that has all three bits
of its fraction.
"""


def calibrate_kv_scales(forward: ForwardPass) -> None:
    """Sets the scales of all layers: powers of two by which the heads' numbers are stored with MARGIN to spare.

    Computes a prompt with KV in the type of the model. All ranks call this together, each for its own heads.
    """
    largest: list[torch.Tensor] = []

    def note(kv_cache: torch.Tensor) -> None:
        largest.append(kv_cache.abs().amax(dim=(0, 3, 4)))

    _run_prompt(forward, LayerHooks(after_store=note))
    for scales, of_heads in zip(forward.model.kv_scales(), largest, strict=True):
        scales.copy_(scales_for(of_heads.float().cpu()))
    logger.info(
        "%s: scales of FP8 KV found by a prompt of %d tokens, with a margin of %g",
        forward.device,
        _num_tokens(forward),
        MARGIN,
    )


def scales_for(largest: torch.Tensor) -> torch.Tensor:
    """Scales of numbers up to MARGIN times these: the power of two from there on; 1 where they are not finite.

    Divided by it, a number keeps all its bits, and where two machines differ in the last bit of the largest number, the
    scale is still the same.
    """
    _, exponents = torch.frexp(largest * (MARGIN / LARGEST))
    powers = torch.ldexp(torch.ones_like(largest), exponents.clamp(-100, 100))
    return torch.where(largest.isfinite(), powers, 1.0)


def check_kv_scales(model: CausalLM) -> None:
    """Checks the scales that a checkpoint has.

    Raises:
        ModelLoadError: one of them is not a positive number.
    """
    for index, scales in enumerate(model.kv_scales()):
        for name, scale in zip(KV_SCALE_NAMES, scales[:, 0].tolist(), strict=True):
            if not 0.0 < scale < float("inf"):
                raise ModelLoadError(
                    f"model.layers.{index}.self_attn.{name} is {scale}, not a positive number; download the checkpoint "
                    "again, or leave kv_cache_dtype='fp8' out"
                )


def _num_tokens(forward: ForwardPass) -> int:
    return min(CALIBRATION_TOKENS, forward.spec.max_model_len)


def _run_prompt(forward: ForwardPass, hooks: LayerHooks) -> None:
    spec, device, num_tokens = forward.spec, forward.device, _num_tokens(forward)
    generator = torch.Generator("cpu").manual_seed(CALIBRATION_SEED)
    with torch.device("cpu"):
        token_ids = torch.randint(spec.model_config.vocab_size, (num_tokens,), generator=generator)
    num_blocks = -(-num_tokens // spec.attention.block_size)
    where = device.torch_device
    positions = torch.arange(num_tokens, device=where)
    metadata = AttentionMetadata(
        slot_mapping=positions,
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=where)[None],
        context_lens=torch.tensor([num_tokens], dtype=torch.int32, device=where),
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32, device=where),
        max_query_len=num_tokens,
        max_context_len=num_tokens,
        hooks=hooks,
    )
    pool = make_kv_pool(spec, device, num_blocks, spec.dtype)
    forward.hidden_states(token_ids.to(where), positions, metadata, pool)
