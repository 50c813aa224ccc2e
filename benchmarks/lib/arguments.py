"""Command lines of the benchmarks: the options that several of them have, and what these mean as arguments of `LLM`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.config import DECODE_PIPELINES, KV_CACHE_DTYPES, KV_HANDOFFS, QUANTIZATIONS, EngineConfig

CLUSTER_MODES = {"processes": "fixed", "elastic-processes": "elastic"}
"""Modes whose cards are processes of their own, and the roles of the cards."""

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
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has; `description` is shown as it is written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="file for the JSON line")
    return parser


def add_shape(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--model-shape`."""
    parser.add_argument("--model-shape", choices=SHAPES, default=default, help="random weights of this shape")
    parser.set_defaults(model=None)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Adds `--quantization`."""
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="weights of the linear layers")


def add_kv_cache_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--kv-cache-dtype`."""
    parser.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="how keys and values are stored"
    )


def add_model(parser: argparse.ArgumentParser, default_shape: str) -> None:
    """Adds `--model-shape` and `--model`."""
    add_shape(parser, default_shape)
    parser.add_argument("--model", help="folder of a checkpoint to serve instead of random weights")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`."""
    parser.add_argument("--device", default="auto")


def add_pool(parser: argparse.ArgumentParser) -> None:
    """Adds `--num-kvcache-blocks`."""
    parser.add_argument(
        "--num-kvcache-blocks", type=int, help="of each device; as many as there is room for, if not given"
    )


def add_tensor_parallel(parser: argparse.ArgumentParser) -> None:
    """Adds `--tensor-parallel-size`."""
    parser.add_argument("--tensor-parallel-size", type=int, default=1)


def add_prefill_chunk_tokens(parser: argparse.ArgumentParser) -> None:
    """Adds `--prefill-chunk-tokens`, with the engine's default."""
    parser.add_argument("--prefill-chunk-tokens", type=int, default=EngineConfig.prefill_chunk_tokens)


def add_mode(parser: argparse.ArgumentParser, default: str, modes: Sequence[str] = ("single", "pd")) -> None:
    """Adds `--mode`, and where its engines run: devices, pools, and the options of mode `pd`."""
    parser.add_argument(
        "--mode",
        choices=modes,
        default=default,
        help="one device (single), prefill and decode on two (pd), both on each (elastic), tensor parallel (tp2)",
    )
    parser.add_argument("--kv-handoff", choices=KV_HANDOFFS, help="of mode pd, auto if not given")
    parser.add_argument("--decode-pipeline", choices=DECODE_PIPELINES, help="of mode pd, no pipeline if not given")
    add_device(parser)
    add_pool(parser)


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses, and refuses the options that `add_mode` has added for `pd` in other modes."""
    args = parser.parse_args()
    for name in ("kv_handoff", "decode_pipeline"):
        if getattr(args, name) and args.mode != "pd":
            parser.error(f"--{name.replace('_', '-')} is of mode pd, not of {args.mode}")
    return args


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


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What to serve, as arguments of `LLM`: the checkpoint of `--model`, or random weights of the shape."""
    options = {name: getattr(args, name) for name in ("quantization", "kv_cache_dtype") if name in args}
    if args.model:
        return {"model": args.model, **options}
    return {"model": write_shape(args.model_shape), "load_format": "dummy", **options}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What to serve and where, as arguments of `LLM`, by the options of `add_model` and `add_mode`."""
    options = {**model_options(args), "device": args.device, "num_kvcache_blocks": args.num_kvcache_blocks}
    if args.mode == "elastic":
        return options | {"enable_two_gpu_pd": True, "card_roles": "elastic"}
    if args.mode in CLUSTER_MODES:
        num_cards = {name: getattr(args, name, None) or 1 for name in ("prefill_cards", "decode_cards")}
        return options | {"cluster": "local", "card_roles": CLUSTER_MODES[args.mode], **num_cards}
    if args.mode == "tp2":
        return options | {"tensor_parallel_size": 2}
    if args.mode != "pd":
        return options
    options |= {"enable_two_gpu_pd": True, "card_roles": "fixed", "kv_handoff": args.kv_handoff or "auto"}
    if args.decode_pipeline:
        options |= {"enable_decode_pipeline": True, "decode_pipeline": args.decode_pipeline}
    return options
