"""What the benchmarks share: model shapes without weights, measured ceilings, results with their circumstances."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import DECODE_PIPELINES, KV_HANDOFFS

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def sm_split(text: str) -> tuple[int, int]:
    """`32:100`, as an argument, is SMs for attention and for the FFN."""
    attention_sm, ffn_sm = map(int, text.split(":"))
    return attention_sm, ffn_sm


def write_shape(name: str) -> str:
    """A folder with the config.json of a model shape, to be run with `load_format="dummy"`."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "dtype": "bfloat16",
        **SHAPES[name],
    }
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


def model_options(folder: str | None, shape: str) -> dict[str, Any]:
    """What to serve, as arguments of `LLM`: a checkpoint, or random weights of a shape if there is none."""
    return {"model": folder} if folder else {"model": write_shape(shape), "load_format": "dummy"}


def parse_pd_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses, after adding `--device`, `--num-kvcache-blocks`, `--output` and the options of mode `pd`, which other
    modes refuse."""
    parser.add_argument("--kv-handoff", choices=KV_HANDOFFS, help="of mode pd, auto if not given")
    parser.add_argument("--decode-pipeline", choices=DECODE_PIPELINES, help="of mode pd, no pipeline if not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--num-kvcache-blocks", type=int, help="of each device; as many as there is room for, if not given"
    )
    parser.add_argument("--output", help="file for the JSON line")
    args = parser.parse_args()
    for name in ("kv_handoff", "decode_pipeline"):
        if getattr(args, name) and args.mode != "pd":
            parser.error(f"--{name.replace('_', '-')} is of mode pd, not of {args.mode}")
    return args


def mode_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where to serve and in how many blocks, as arguments of `LLM`: on two devices in mode `pd`."""
    options: dict[str, Any] = {"num_kvcache_blocks": args.num_kvcache_blocks}
    if args.mode != "pd":
        return options
    options |= {"enable_two_gpu_pd": True, "kv_handoff": args.kv_handoff or "auto"}
    if args.decode_pipeline:
        options |= {"enable_decode_pipeline": True, "decode_pipeline": args.decode_pipeline}
    return options


def median_ms(function: Any, repeats: int = 20) -> float:
    """Median GPU time of a call, by events, after a warm-up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def gemm_rate() -> float:
    """FLOP per second of a large bfloat16 matrix product on random data."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b) * 1e3


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
