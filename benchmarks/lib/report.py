"""What a benchmark ends with: quantiles, and a line of JSON that says under which circumstances it was measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def quantiles_ms(values_s: list[float]) -> dict[str, float]:
    """QUANTILES, in milliseconds, of values in seconds."""
    ordered = sorted(values_s)
    return {name: quantile(ordered, q) * 1e3 for name, q in QUANTILES.items()}


def circumstances() -> dict[str, Any]:
    """Commit, hardware, versions and command of a measurement."""
    return {
        "commit": os.environ.get("NANOVLLM_COMMIT") or _git_commit(),
        **_hardware(),
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }


def report(name: str, result: dict[str, Any], output: str | None) -> None:
    """Prints the JSON line that ends every benchmark, and writes it to `output` if given."""
    line = json.dumps({"benchmark": name, **circumstances(), **result})
    if output:
        Path(output).write_text(line + "\n")
    print(line)


def _hardware() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"cpu": platform.processor() or platform.machine()}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True)
    return {"gpu": torch.cuda.get_device_name(), "driver": driver.stdout.strip()}


def _git_commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"
