"""Compiles CUDA C++ for Hopper (sm_90a) of float16 or bfloat16, with `cuda_hopper.cu` before it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from nanovllm.utils.nvrtc import compile_source

ARCHITECTURE = "sm_90a"


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU that runs code for sm_90a."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def compile_for_hopper(file: Path, dtype: torch.dtype, constants: Mapping[str, int], macros: str) -> bytes:
    """The machine code of a source file.

    Args:
        file: the source.
        dtype: of the values, `torch.float16` or `torch.bfloat16`.
        constants: what the source asks to be defined, besides BF16.
        macros: instructions that it uses, from `product` for example.

    Raises:
        BackendUnavailableError: there is no NVRTC, or it refuses the source.
    """
    defined = {**constants, "BF16": int(dtype == torch.bfloat16)}
    lines = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    shared = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    return compile_source(lines + macros + shared + file.read_text(encoding="utf-8"), file.name, ARCHITECTURE)


def product(name: str, width: int, dtype: torch.dtype) -> str:
    """The macro of the instruction that multiplies 64 rows by `width`: `name`(d, a, b, adds), on accumulators d and
    descriptors a and b of rows."""
    number = width // 2
    return (
        f'#define {name}(d, a, b, adds) asm volatile("{{ .reg .pred p; '
        f"setp.ne.b32 p, %{number + 2}, 0; {instruction(width, dtype)}, %{number}, %{number + 1}, "
        f'p, 1, 1, 0, 0; }}" : {accumulators(width)} : "l"(a), "l"(b), "r"(static_cast<int>(adds)))\n'
    )


def instruction(width: int, dtype: torch.dtype) -> str:
    """The instruction of `product`, up to its accumulators, all of which it names."""
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    registers = ", ".join(f"%{place}" for place in range(width // 2))
    return f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} {{{registers}}}"


def accumulators(width: int) -> str:
    """The accumulators of `instruction` as operands."""
    return ", ".join(f'"+f"((d)[{place}])' for place in range(width // 2))
