"""What a check of the doctor has found."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, MISSING, FAILED = "ok", "warning", "missing", "failed"


@dataclass(frozen=True)
class Finding:
    """What one check found; `next_step` is empty where there is nothing to do."""

    check: str
    verdict: str
    found: str
    next_step: str = ""
