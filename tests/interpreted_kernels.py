"""The Triton kernels in Triton's interpreter, against the torch reference. Run by test_triton.py, in its own process:
`TRITON_INTERPRET` is read when a kernel is defined. bfloat16 is left out: the interpreter gets it wrong."""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernel_cases import DECODE, PREFILL, make_case, relative_error

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton.py"
from nanovllm.kernels.triton_attention import Backend  # noqa: E402 - only once the mode is known

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("spans", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"), [(2, 2, 64, 16), (8, 2, 64, 32), (6, 2, 128, 16)]
)
def test_attention_equals_reference(spans, dtype, num_heads, num_kv_heads, head_dim, block_size):
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = make_case(spans, device="cpu", dtype=dtype, **shape)
    assert relative_error(Backend(), case) < TOLERANCE[dtype]
