"""The engine's options: names, defaults, ranges. A leaf: knows nothing about models or devices."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ConfigError, short_repr

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATIONS = ("fp8",)
KV_CACHE_DTYPES = ("auto", "fp8")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
ATTENTION_BACKENDS = ("auto", "torch", "triton", "flash_attn")
KV_HANDOFFS = ("auto", "copy", "push", "direct")
BLOCK_SIZE_MULTIPLE = 16
TWO_GPU_OPTIONS = (
    "card_roles",
    "prefill_device_id",
    "decode_device_id",
    "kv_handoff",
    "verify_kv_handoff",
    "handoff_timeout_s",
    "max_handoff_backlog",
)
CLUSTER_OPTIONS = ("prefill_cards", "decode_cards", "card_timeout_s")
NOT_IN_A_CLUSTER = ("prefill_device_id", "decode_device_id", "kv_handoff")
CLUSTERS = ("local", "ray")
CARD_ROLES = ("fixed", "elastic")
DECODE_PIPELINES = ("static", "auto", "disabled")
PIPELINE_OPTIONS = (
    "decode_pipeline",
    "decode_attention_sm",
    "decode_ffn_sm",
    "decode_micro_batches",
    "decode_pipeline_profiling",
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of `LLM(model, ...)`; frozen.

    Args:
        model: folder of a Hugging Face checkpoint, or its name on the Hugging Face hub (`org/name`): taken from the
            local cache or downloaded, safetensors, tokenizer and config only. A folder of that name wins;
            `HF_HUB_OFFLINE=1` looks into the cache alone.
        max_num_batched_tokens: maximum number of prompt tokens in a step. The tokens that decode in it are not counted:
            `max_num_seqs` bounds them.
        prefill_chunk_tokens: the same limit on a device where streamed requests decode, if that is lower; streamed are
            all requests but those of `generate` and `chat` without stop strings.
        max_num_seqs: maximum number of requests that hold KV blocks at a time.
        max_model_len: maximum length of a request in tokens, prompt and output; None takes 4096, or what the model
            allows if that is less.
        gpu_memory_utilization: share of a GPU's memory that weights, workspace and KV pool may take together.
        tensor_parallel_size: GPUs that compute the model together, each in a process of its own; with `device="cpu"`
            processes on it.
        enforce_eager: run without CUDA graphs.
        kvcache_block_size: tokens in a KV block, a multiple of 16; None takes the attention backend's best.
        num_kvcache_blocks: blocks of the KV pool, on each device; None takes what fits on a GPU; on a CPU it
            makes a pool of 512 MiB, or of one request of `max_model_len` tokens if that is more.
        device: `auto` (a GPU if there is one), `cuda`, `cuda:N` or `cpu`.
        dtype: `auto` (the checkpoint's on a GPU, float32 on a CPU), `float32`, `float16` or `bfloat16`.
        quantization: `fp8` has the weights of all linear layers in FP8 (e4m3), but not the output head and the routers
            of experts: those of a checkpoint that has them in a wider type are quantized as they are loaded, with a
            scale for each output. Their inputs are quantized token by token. None for what the checkpoint has. Needs a
            CPU, or a GPU with FP8 (Ada, Hopper and later).
        kv_cache_dtype: `auto` (the type of the model) or `fp8`: keys and values are stored as e4m3, with a scale for
            each KV head of a layer, so that twice as many fit. The scales are the checkpoint's if it has them, else
            found by a prompt of fixed tokens at the start. Needs what `quantization` needs.
        load_format: `auto` and `safetensors` read the checkpoint's weights; `dummy` makes random ones.
        attention_backend: `torch`, `triton`, `flash_attn`, or `auto`: `triton` on a GPU if it can serve there, else
            `torch`.
        enable_prefix_caching: share KV blocks between requests whose prompts begin with the same tokens.
        seed: requests without a seed of their own derive theirs from it, and `dummy` weights are drawn with it.
        step_timeout_s: seconds after which a step that has not ended is taken for a lost GPU: all requests end with a
            `DeviceError`. In a cluster only that card is given up, also one whose main thread stands still for so
            long.
        enable_two_gpu_pd: prefill on one GPU and decode on another; with `device="cpu"`, on two logical CPU devices.
        card_roles: `fixed` (one GPU prefills, the other one decodes) or `elastic` (both prefill and decode: they
            compute long prompts together, in chunks by turns; requests with short ones decode on one card while its
            steps are short, else where fewer tokens of context are). In a cluster with elastic cards all of them
            prefill and decode, and none computes a prompt together with another.
        prefill_device_id, decode_device_id: two different GPUs, by torch's ids (after `CUDA_VISIBLE_DEVICES`).
        kv_handoff: how KV is transferred to the decode GPU: `copy` (torch's copies, after each prefill step), `push`
            (the same by one kernel, over peer access), `direct` (each layer's KV within the step, while the layer
            attends), or `auto`, which takes `direct` where there is peer access.
        verify_kv_handoff: checksum every block on both sides; a difference is an error of its request. Slow.
        handoff_timeout_s: seconds after which a handoff that has not ended fails its request; one by `direct` ends with
            the prefill step.
        max_handoff_backlog: maximum number of requests between the beginning of their prefill and the arrival of their
            KV; others wait in the queue.
        cluster: `local` gives each card a process of its own on this host, and KV crosses between them by NIXL; `ray`
            the same on the hosts of a Ray cluster; None for cards of this process.
        prefill_cards, decode_cards: cards of a cluster that prefill, and that decode; all do both if they are elastic.
            On GPUs they take torch's first ones, or those that Ray gives; with `device="cpu"` they are processes of
            the CPU.
        card_timeout_s: seconds of silence after which a card's process is taken for hung: it is ended and started
            again, and its requests are recomputed on other cards.
        itl_target_ms: what a decode step may be predicted to take: a request waits in the queue while a step with it
            would take longer, and a step with prompts takes no more of them than there is time for, but for 32 tokens
            of the oldest. None for no such limit, but for elastic cards: there a step with prompts takes at most 1.5
            times what it would take without, while streamed requests decode.
        enable_decode_pipeline: run attention and GEMMs of decode steps side by side on two SM partitions of the decode
            card; needs `enable_two_gpu_pd=True`.
        decode_pipeline: `static` (the given split for every step), `auto` (whichever of the pipeline and plain decode
            measured faster for the batch) or `disabled` (plain decode, whatever the other pipeline options say);
            None takes `static` if SM counts are given, else `auto`.
        decode_attention_sm, decode_ffn_sm: SMs of the two partitions; None for what measured best, or, where the other
            one is given, for the SMs that it leaves.
        decode_micro_batches: parts of a batch that take turns on the partitions, 2 to 8.
        decode_pipeline_profiling: time the partitions for `decode_runner.get_pipeline_statistics()`.
        trace: a file to which `close()` writes what ran where and when, for ui.perfetto.dev; None for none.
        revision: branch, tag or commit of a model on the hub; None for its main branch. Refused for a local folder.

    Raises:
        ConfigError: a value is of the wrong type, out of range or contradicts another.
    """

    model: str
    max_num_batched_tokens: int = 16384
    prefill_chunk_tokens: int = 1024
    max_num_seqs: int = 512
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    kvcache_block_size: int | None = None
    num_kvcache_blocks: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    load_format: str = "auto"
    attention_backend: str = "auto"
    enable_prefix_caching: bool = True
    seed: int = 0
    step_timeout_s: float = 120.0
    enable_two_gpu_pd: bool = False
    card_roles: str = "fixed"
    prefill_device_id: int = 0
    decode_device_id: int = 1
    kv_handoff: str = "auto"
    verify_kv_handoff: bool = False
    handoff_timeout_s: float = 30.0
    max_handoff_backlog: int = 256
    cluster: str | None = None
    prefill_cards: int = 1
    decode_cards: int = 1
    card_timeout_s: float = 10.0
    itl_target_ms: float | None = None
    enable_decode_pipeline: bool = False
    decode_pipeline: str | None = None
    decode_attention_sm: int | None = None
    decode_ffn_sm: int | None = None
    decode_micro_batches: int = 2
    decode_pipeline_profiling: bool = False
    trace: str | os.PathLike[str] | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "prefill_chunk_tokens", "max_num_seqs"):
            _check_positive(name, getattr(self, name))
        for name in ("max_model_len", "kvcache_block_size", "num_kvcache_blocks"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.max_model_len == 1:
            raise ConfigError("max_model_len=1 leaves no room for an answer; pass at least 2")
        if self.kvcache_block_size is not None and self.kvcache_block_size % BLOCK_SIZE_MULTIPLE:
            raise ConfigError(
                f"kvcache_block_size={self.kvcache_block_size} is not a multiple of {BLOCK_SIZE_MULTIPLE}; "
                "pass one, or None for the attention backend's best"
            )
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
            raise ConfigError(f"gpu_memory_utilization={short_repr(share)} is not a number above 0 and at most 1")
        _check_positive("tensor_parallel_size", self.tensor_parallel_size)
        if self.tensor_parallel_size > 1 and self.enable_two_gpu_pd:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size} and enable_two_gpu_pd=True exclude each other: "
                "leave one of them out"
            )
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,9})?", self.device):
            raise ConfigError(f"device={short_repr(self.device)} is not one of 'auto', 'cuda', 'cuda:N', 'cpu'")
        if ":" in self.device and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"device={self.device!r} names one GPU, tensor_parallel_size={self.tensor_parallel_size} uses the "
                "first ones; pass device='cuda', and CUDA_VISIBLE_DEVICES for others"
            )
        _check_choice("dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_bool("enforce_eager", self.enforce_eager)
        _check_bool("enable_prefix_caching", self.enable_prefix_caching)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={short_repr(self.seed)} is not an integer from 0 to 2**63 - 1")
        _check_seconds("step_timeout_s", self.step_timeout_s)
        if self.trace is not None and not isinstance(self.trace, (str, os.PathLike)):
            raise ConfigError(f"trace={short_repr(self.trace)} is not the path of a file to write; pass one, or None")
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision):
            raise ConfigError(
                f"revision={short_repr(self.revision)} is not a branch, tag or commit of a model on the hub"
            )
        self._check_two_gpu_options()
        self._check_cluster_options()
        self._check_pipeline_options()

    @property
    def pipeline_mode(self) -> str:
        """`decode_pipeline` with its defaults: `disabled` without `enable_decode_pipeline`."""
        if not self.enable_decode_pipeline:
            return "disabled"
        has_split = self.decode_attention_sm is not None or self.decode_ffn_sm is not None
        return self.decode_pipeline or ("static" if has_split else "auto")

    def _check_pipeline_options(self) -> None:
        _check_bool("enable_decode_pipeline", self.enable_decode_pipeline)
        _check_bool("decode_pipeline_profiling", self.decode_pipeline_profiling)
        if self.decode_pipeline is not None:
            _check_choice("decode_pipeline", self.decode_pipeline, DECODE_PIPELINES)
        for name in ("decode_attention_sm", "decode_ffn_sm"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        micro_batches = self.decode_micro_batches
        if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or not 2 <= micro_batches <= 8:
            raise ConfigError(f"decode_micro_batches={short_repr(micro_batches)} is not an integer from 2 to 8")
        if self.enable_decode_pipeline and not self.enable_two_gpu_pd:
            raise ConfigError(
                "enable_decode_pipeline=True needs enable_two_gpu_pd=True: it splits the SMs of a decode card"
            )

    def _check_cluster_options(self) -> None:
        _check_positive("prefill_cards", self.prefill_cards)
        _check_positive("decode_cards", self.decode_cards)
        _check_seconds("card_timeout_s", self.card_timeout_s)
        if self.cluster is None:
            return
        _check_choice("cluster", self.cluster, CLUSTERS)
        if self.enable_two_gpu_pd or self.tensor_parallel_size > 1:
            tensor_parallel = f"tensor_parallel_size={self.tensor_parallel_size}"
            other = "enable_two_gpu_pd=True" if self.enable_two_gpu_pd else tensor_parallel
            raise ConfigError(
                f"cluster={self.cluster!r} and {other} exclude each other: a card of a cluster is one GPU with a "
                "process of its own; leave one of them out"
            )
        if ":" in self.device:
            raise ConfigError(
                f"device={self.device!r} names one GPU, a cluster uses the first ones; pass device='cuda', and "
                "CUDA_VISIBLE_DEVICES for others"
            )

    def _check_two_gpu_options(self) -> None:
        _check_bool("enable_two_gpu_pd", self.enable_two_gpu_pd)
        _check_bool("verify_kv_handoff", self.verify_kv_handoff)
        _check_choice("kv_handoff", self.kv_handoff, KV_HANDOFFS)
        _check_choice("card_roles", self.card_roles, CARD_ROLES)
        _check_positive("max_handoff_backlog", self.max_handoff_backlog)
        for name in ("prefill_device_id", "decode_device_id"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1000:
                raise ConfigError(f"{name}={short_repr(value)} is not a device id (0, 1, ...)")
        _check_seconds("handoff_timeout_s", self.handoff_timeout_s)
        if self.itl_target_ms is not None:
            _check_seconds("itl_target_ms", self.itl_target_ms, "milliseconds")
        if self.card_roles == "elastic" and self.kv_handoff not in ("auto", "direct"):
            raise ConfigError(
                f"card_roles='elastic' pushes KV within the steps that compute it, kv_handoff={self.kv_handoff!r} is "
                "for fixed roles; leave one of them out"
            )
        if self.card_roles == "elastic" and self.enable_decode_pipeline:
            raise ConfigError(
                "card_roles='elastic' and enable_decode_pipeline=True exclude each other: the pipeline splits a card "
                "that only decodes; leave one of them out"
            )
        if not self.enable_two_gpu_pd:
            return
        if self.prefill_device_id == self.decode_device_id:
            raise ConfigError(
                f"prefill_device_id and decode_device_id are both {self.prefill_device_id}; pass two different ids, "
                "or leave enable_two_gpu_pd out to use one device"
            )
        if ":" in self.device:
            raise ConfigError(
                f"device={self.device!r} names one GPU, enable_two_gpu_pd uses two; pass device='cuda' with "
                "prefill_device_id and decode_device_id"
            )

    @classmethod
    def from_options(cls, model: str, options: dict[str, Any]) -> EngineConfig:
        """Makes a config from keyword options.

        Raises:
            ConfigError: an option is unknown (with the nearest known name) or its value is refused.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.name != "model"]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}; {hint}")
        switches = (
            ("enable_two_gpu_pd", TWO_GPU_OPTIONS),
            ("enable_decode_pipeline", PIPELINE_OPTIONS),
            ("cluster", CLUSTER_OPTIONS),
        )
        in_cluster = options.get("cluster") is not None
        refused = [name for name in NOT_IN_A_CLUSTER if name in options]
        if in_cluster and refused:
            raise ConfigError(
                f"{', '.join(refused)} given with cluster={short_repr(options['cluster'])}: its cards take "
                "the first GPUs and hand over KV by NIXL; leave them out"
            )
        for switch, switched in switches:
            unused = [name for name in switched if name in options]
            if in_cluster and switch == "enable_two_gpu_pd":
                continue  # the others of these a cluster has, too
            if unused and not options.get(switch):
                value = "'local' or 'ray'" if switch == "cluster" else "True"
                if switch == "enable_two_gpu_pd" and not set(unused).intersection(NOT_IN_A_CLUSTER):
                    value += " or cluster='local' or 'ray'"
                raise ConfigError(f"{', '.join(unused)} given without {switch}={value}; add it or leave them out")
        return cls(model=model, **options)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={short_repr(value)} is not a positive integer")


def _check_seconds(name: str, value: object, unit: str = "seconds") -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 < value <= sys.float_info.max:  # type: ignore[operator] # it is one
        raise ConfigError(f"{name}={short_repr(value)} is not a positive number of {unit}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}={short_repr(value)} is not one of {', '.join(map(repr, choices))}{hint}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={short_repr(value)} is not a bool; pass True or False")
