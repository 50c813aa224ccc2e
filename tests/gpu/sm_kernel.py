"""A kernel that says where it runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def note_sm(sms):
    """Each program notes its SM, and stays there long enough for the others to need theirs."""
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    total = 0.0
    for turn in range(2000):
        total = total * 1.0001 + turn
    tl.store(sms + tl.program_id(0), sm + (total < -1.0).to(tl.int32))
