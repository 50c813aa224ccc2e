"""Makes the parts of an engine out of its options: resolves every `auto` and places runners on devices."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import logging
import math
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.distributed.tensor_parallel import Workers
from nanovllm.engine.execution.decode_paths import NoPaths
from nanovllm.engine.execution.fingerprint import fingerprint
from nanovllm.engine.execution.kv_transfer import KVTransfer, NoTransfer, PeerTransfer, resolve_handoff
from nanovllm.engine.execution.load_model import weight_bytes
from nanovllm.engine.execution.runner_spec import PipelineOptions, RunnerSpec
from nanovllm.engine.execution.worker_group import WorkerGroup
from nanovllm.engine.kept_step_times import KeptStepTimes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.observability.trace import Tracer
from nanovllm.engine.observer import Observer
from nanovllm.engine.requests import RequestIntake
from nanovllm.engine.runners import Runners
from nanovllm.engine.scheduler import MAX_STREAMED_PREFILL_TOKENS, Scheduler, SchedulerLimits
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.cluster_placement import ClusterPlacement, ElasticClusterPlacement
from nanovllm.engine.scheduling.placement import ElasticPlacement, Placement
from nanovllm.engine.scheduling.step_time import ModelCosts, StepTimeModel
from nanovllm.engine.text.tokenizer import end_of_sequence_ids, load_tokenizer, warn_of_generation_settings
from nanovllm.errors import BackendUnavailableError, ConfigError, ModelLoadError, NanoVLLMError, short_repr
from nanovllm.kernels import BackendRequirements, resolve_backend, torch_reference
from nanovllm.layers.experts import ExpertsConfig
from nanovllm.layers.ranks import Ranks
from nanovllm.models import resolve_model
from nanovllm.models.decoder import CausalLM
from nanovllm.models.description import ModelDescription
from nanovllm.models.quantization import QUANTIZATIONS
from nanovllm.utils.checkpoint import checkpoint_folder, read_json
from nanovllm.utils.device import Device, peer_access, resolve_device, resolve_device_pair
from nanovllm.utils.loader import tensors_differ

if TYPE_CHECKING:  # what they import may not be installed
    from nanovllm.engine.distributed.cluster import Cluster
    from nanovllm.engine.distributed.remote_card import RemoteRunner

logger = logging.getLogger(__name__)

BUILD_LOCK = threading.Lock()
"""Held while an engine is built: a CUDA graph capture fails if another thread captures at the same time."""

DEFAULT_MAX_MODEL_LEN = 4096

FP8_CAPABILITY = (8, 9)
"""First GPUs whose tensor cores take FP8."""

MAX_WAIT_S = 1e6
"""Kernels count a wait's milliseconds in 32 bits."""


@dataclass(frozen=True)
class EngineParts:
    tokenizer: PreTrainedTokenizerBase | None
    runners: Runners
    kv_transfers: dict[tuple[Card, Card], KVTransfer]
    """Each by the card whose blocks it sends, and the one that it sends them to."""
    scheduler: Scheduler
    intake: RequestIntake
    observer: Observer
    kept_step_times: KeptStepTimes
    remote_runners: dict[Card, RemoteRunner]
    """The runners of a cluster."""
    agents_with_messages: Callable[[int], set[str]] | None
    """Gives the processes of the cluster that have said something; see `CardWatch`."""
    close_cluster: Callable[[], None]
    """Ends the processes of a cluster, all at once, and closes what they were connected to."""


def build_engine(config: EngineConfig) -> EngineParts:
    """The parts of an engine.

    Raises:
        ConfigError: an option contradicts the checkpoint or the machine.
        ModelLoadError: the checkpoint cannot be served, or its weights do not fit.
        BackendUnavailableError: the attention backend that was asked for cannot serve.
        OutOfKVCacheError: a KV pool does not fit.
        WorkerError: one of several ranks did not start.
        ClusterError: a card of a cluster did not start.
    """
    tracer = None if config.trace is None else Tracer(config.trace)
    folder = checkpoint_folder(config.model, config.revision)
    hf_config = read_json(folder, "config.json") or {}
    if config.cluster is not None:
        return _build_cluster(config, folder, hf_config, tracer)
    devices = resolve_devices(config)
    spec = runner_spec(config, folder, hf_config, devices[0])
    ranks = (_device_of(devices[0], rank) for rank in range(1, spec.num_ranks))
    check_fp8(spec.model_config, [*devices, *ranks])
    tokenizer, eos_ids = _text_parts(folder, hf_config, spec)
    with BUILD_LOCK:
        prefill_runner, decode_runner, transfers = build_runners(config, spec, devices)
    try:
        return _parts(config, prefill_runner, decode_runner, transfers, tokenizer, eos_ids, tracer)
    except BaseException:
        decode_runner.close_workers()
        raise


def _text_parts(
    folder: Path, hf_config: dict[str, Any], spec: RunnerSpec
) -> tuple[PreTrainedTokenizerBase | None, frozenset[int]]:
    """The tokenizer, and the tokens that end a text."""
    tokenizer = load_tokenizer(folder)
    eos_ids = end_of_sequence_ids(folder, hf_config, tokenizer, spec.model_config.vocab_size)
    warn_of_generation_settings(folder, hf_config)
    return tokenizer, eos_ids


def _build_cluster(config: EngineConfig, folder: Path, hf_config: dict[str, Any], tracer: Tracer | None) -> EngineParts:
    """An engine whose cards are processes of their own."""
    check_cluster_packages()
    from nanovllm.engine.distributed.cluster import make_starter, start_cluster

    starter = make_starter(config)
    try:
        spec = runner_spec(config, folder, hf_config, Device(starter.kind, 0))
        check_kv_of_cluster(spec)
        tokenizer, eos_ids = _text_parts(folder, hf_config, spec)
    except BaseException:
        starter.close()
        raise
    cluster = start_cluster(config, spec, starter)
    try:
        return _cluster_parts(config, cluster, spec, tokenizer, eos_ids, tracer)
    except BaseException:
        cluster.close()
        raise


def _parts(
    config: EngineConfig,
    prefill_runner: ModelRunner,
    decode_runner: ModelRunner,
    transfers: tuple[KVTransfer, KVTransfer],
    tokenizer: PreTrainedTokenizerBase | None,
    eos_ids: frozenset[int],
    tracer: Tracer | None,
) -> EngineParts:
    spec = decode_runner.spec
    placement = build_placement(config, prefill_runner, decode_runner)
    runner_of = {placement.prefill_card: prefill_runner, placement.decode_card: decode_runner}
    runners = Runners({card: runner_of[card] for card in placement.cards})
    scheduler = build_scheduler(config, placement)
    kv_transfer, transfer_back = transfers
    options = resolved_options(config, prefill_runner, decode_runner, kv_transfer)
    logger.info("resolved options: %s", ", ".join(f"{name}={value}" for name, value in options.items()))
    intake = build_intake(config, spec, scheduler.cards, tokenizer, eos_ids)
    if tracer is not None:
        paths = decode_runner.decode.paths
        paths.tracer, paths.clock = tracer, decode_runner.clock
    observer = Observer(
        scheduler,
        decode_runner.decode.paths,
        spec.block_bytes,
        kv_transfer.name,
        tracer,
        verifies_handoffs=config.verify_kv_handoff,
    )
    kept_step_times = KeptStepTimes(
        [(card.step_time, step_time_fingerprint(config, runners[card])) for card in placement.cards]
    )
    kept_step_times.restore()
    first, second = placement.prefill_card, placement.decode_card
    kv_transfers = {(second, first): transfer_back, (first, second): kv_transfer}
    return EngineParts(
        tokenizer,
        runners,
        kv_transfers,
        scheduler,
        intake,
        observer,
        kept_step_times,
        {},
        None,
        close_cluster=lambda: None,
    )


def _cluster_parts(
    config: EngineConfig,
    cluster: Cluster,
    spec: RunnerSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    eos_ids: frozenset[int],
    tracer: Tracer | None,
) -> EngineParts:
    from nanovllm.engine.distributed.remote_card import RemoteTransfer

    is_elastic = config.card_roles == "elastic"
    prefill, decode = (
        {
            make_card(config, runner, f"{runner.device}" if is_elastic else f"{role} {runner.device}"): runner
            for runner in runners
        }
        for role, runners in (("prefill", cluster.prefill), ("decode", cluster.decode))
    )
    runner_of = prefill | decode
    placement = (
        ElasticClusterPlacement(list(runner_of)) if is_elastic else ClusterPlacement(list(prefill), list(decode))
    )
    kv_transfers: dict[tuple[Card, Card], KVTransfer] = {
        (one, other): RemoteTransfer(runner_of[one], runner_of[other], verify=config.verify_kv_handoff)
        for one, other in itertools.permutations(placement.cards, 2)
    }
    scheduler = build_scheduler(config, placement)
    observer = Observer(
        scheduler,
        NoPaths(),
        spec.block_bytes,
        RemoteTransfer.name,
        tracer,
        verifies_handoffs=config.verify_kv_handoff,
    )
    return EngineParts(
        tokenizer,
        # They have what the loop needs of a runner.
        Runners({card: cast(ModelRunner, runner_of[card]) for card in placement.cards}),
        kv_transfers,
        scheduler,
        build_intake(config, spec, placement.cards, tokenizer, eos_ids),
        observer,
        KeptStepTimes([]),
        runner_of,
        cluster.sockets.agents_with_messages,
        cluster.close,
    )


def build_intake(
    config: EngineConfig,
    spec: RunnerSpec,
    cards: Iterable[Card],
    tokenizer: PreTrainedTokenizerBase | None,
    eos_ids: frozenset[int],
) -> RequestIntake:
    """What checks and makes the requests of an engine with these cards."""
    pools = [card.block_manager for card in cards]
    return RequestIntake(
        tokenizer=tokenizer,
        vocab_size=spec.model_config.vocab_size,
        max_model_len=spec.max_model_len,
        pool_tokens=min(pool.num_blocks * pool.block_size for pool in pools),
        eos_ids=eos_ids,
        seed=config.seed,
    )


def resolved_options(
    config: EngineConfig, prefill_runner: ModelRunner, decode_runner: ModelRunner, kv_transfer: KVTransfer
) -> dict[str, Any]:
    """Every option by name with its resolved value; numbers of blocks and of SMs may be several."""
    spec, runners = decode_runner.spec, {"prefill": prefill_runner, "decode": decode_runner}
    pipeline = decode_runner.get_pipeline_statistics()
    return dataclasses.asdict(config) | {
        "max_model_len": spec.max_model_len,
        "kvcache_block_size": decode_runner.block_size,
        "num_kvcache_blocks": {name: runner.num_kv_blocks for name, runner in runners.items()},
        "device": decode_runner.device.kind,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "quantization": None if spec.model_config.quantization is None else "fp8",
        "kv_cache_dtype": "fp8" if spec.model_config.has_fp8_kv else str(spec.dtype).removeprefix("torch."),
        "load_format": "safetensors" if spec.load_format == "auto" else spec.load_format,
        "attention_backend": spec.attention.backend.name,
        "prefill_device_id": prefill_runner.device.index,
        "decode_device_id": decode_runner.device.index,
        "kv_handoff": kv_transfer.name,
        "decode_pipeline": "disabled" if pipeline["fallbacks"] else config.pipeline_mode,
        "decode_attention_sm": pipeline["attention_sm"],
        "decode_ffn_sm": pipeline["ffn_sm"],
    }


def resolve_devices(config: EngineConfig) -> tuple[Device, Device]:
    """Prefill device and decode device; the same device twice without `enable_two_gpu_pd`.

    Raises:
        ConfigError: a device does not exist.
    """
    if config.enable_two_gpu_pd:
        return resolve_device_pair(config.device, config.prefill_device_id, config.decode_device_id)
    device = resolve_device(config.device)
    if config.tensor_parallel_size > 1:
        device = Device(device.kind, 0)
    return device, device


def check_cluster_packages() -> None:
    """Checks that what a cluster needs is installed.

    Raises:
        BackendUnavailableError: a package is missing.
    """
    missing = [name for name in ("zmq", "msgspec", "nixl_cu13") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f"a cluster needs {', '.join(missing)}; pip install nanovllm[cluster]")


def check_kv_of_cluster(spec: RunnerSpec) -> None:
    """Checks that the KV which one card of a cluster stores means the same on the others.

    Raises:
        ConfigError: each would calibrate scales of its own.
    """
    if spec.model_config.has_fp8_kv and not spec.model_config.has_kv_scales:
        raise ConfigError(
            "kv_cache_dtype='fp8' in a cluster needs a checkpoint with scales of its KV, since each card would "
            "calibrate its own; leave it out, or use enable_two_gpu_pd, where cards share them"
        )


def runner_spec(config: EngineConfig, folder: Path, hf_config: dict[str, Any], device: Device) -> RunnerSpec:
    """The spec that the runners share, with every `auto` and None of the options resolved."""
    model_class, model_config = resolve_model(hf_config)
    if config.load_format != "dummy":
        model_config = with_untied_lm_head(folder, model_class, model_config)
    check_ranks(config.tensor_parallel_size, model_config, device)
    is_drawn = config.load_format == "dummy"
    model_config = with_quantization(model_config, config.quantization, is_drawn=is_drawn)
    model_config = with_kv_cache(model_config, config.kv_cache_dtype, is_drawn=is_drawn)
    dtype = resolve_dtype(config.dtype, hf_config, device)
    needs = BackendRequirements(
        device.kind,
        dtype,
        model_config.head_dim,
        config.kvcache_block_size,
        has_scaled_weights=model_config.quantization is not None,
        has_experts=isinstance(model_config.ffn, ExpertsConfig),
        has_fp8_kv=model_config.has_fp8_kv,
    )
    attention = resolve_backend(config.attention_backend, needs)
    logger.info(
        "%s on %s: attention backend %s (%s), %s, blocks of %d tokens",
        folder.name,
        device.kind,
        attention.backend.name,
        attention.reason,
        dtype,
        attention.block_size,
    )
    return RunnerSpec(
        folder=folder,
        model_class=model_class,
        model_config=model_config,
        attention=attention,
        dtype=dtype,
        load_format=config.load_format,
        seed=config.seed,
        max_model_len=resolve_max_model_len(config.max_model_len, model_config),
        max_num_seqs=config.max_num_seqs,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_kvcache_blocks=config.num_kvcache_blocks,
        enforce_eager=config.enforce_eager,
        step_timeout_s=config.step_timeout_s,
        num_ranks=config.tensor_parallel_size,
    )


def with_untied_lm_head(folder: Path, model_class: type[CausalLM], model_config: ModelDescription) -> ModelDescription:
    """The description, with `tie_word_embeddings` unset if the checkpoint's `lm_head` and embedding differ.

    Raises:
        ModelLoadError: the weights cannot be read.
    """
    if not model_config.tie_word_embeddings or not tensors_differ(folder, *model_class.tied_tensors):
        return model_config
    embedding, head = model_class.tied_tensors
    logger.warning(
        "%s: config.json has tie_word_embeddings=true, but %s and %s differ; both are used, as in transformers. "
        "Set tie_word_embeddings=false if they are meant to, or take %s out",
        folder,
        embedding,
        head,
        head,
    )
    return dataclasses.replace(model_config, tie_word_embeddings=False)


def with_quantization(config: ModelDescription, option: str | None, *, is_drawn: bool) -> ModelDescription:
    """The description, with the linear layers' weights as the option or the checkpoint has them.

    Weights that are drawn at random, not read, are quantized as if the checkpoint had them in a wide type.
    """
    quantization = config.quantization or (None if option is None else QUANTIZATIONS[option])
    if quantization is not None and is_drawn:
        quantization = dataclasses.replace(quantization, scale_name=None)
    return dataclasses.replace(config, quantization=quantization)


def with_kv_cache(config: ModelDescription, option: str, *, is_drawn: bool) -> ModelDescription:
    """The description, with KV in FP8 if the option says so: what a checkpoint has are scales for it, no more.

    Where weights are drawn at random, the checkpoint's scales say nothing of them.
    """
    if config.has_kv_scales and option == "auto":
        logger.info("the checkpoint has scales of FP8 KV, which kv_cache_dtype='fp8' would use")
    return dataclasses.replace(config, has_fp8_kv=option == "fp8", has_kv_scales=config.has_kv_scales and not is_drawn)


def check_fp8(config: ModelDescription, devices: Iterable[Device]) -> None:
    """Checks that devices can compute with the model's weights and KV.

    Raises:
        ConfigError: some are FP8, and a GPU has none.
    """
    fp8 = []
    if config.quantization is not None:
        fp8.append(("the model's weights", "serve a checkpoint in bfloat16 without quantization='fp8'"))
    if config.has_fp8_kv:
        fp8.append(("KV", "leave kv_cache_dtype='fp8' out"))
    for device, (what, remedy) in itertools.product(devices, fp8):
        if not device.is_cuda:
            continue
        major, minor = torch.cuda.get_device_capability(device.index)
        if (major, minor) < FP8_CAPABILITY:
            raise ConfigError(
                f"{device} (sm_{major}{minor}) has no FP8, in which {what} would be: GPUs from "
                f"sm_{FP8_CAPABILITY[0]}{FP8_CAPABILITY[1]} on have it (Ada, Hopper and later); {remedy}, or use "
                "another GPU"
            )


def model_memory(model: str, dtype: str = "auto", devices: Iterable[Device] = ()) -> tuple[int, int]:
    """Bytes of a checkpoint's weights and of one token's KV on a GPU, computed from its config.json.

    Reads and downloads no weights.

    Raises:
        ConfigError: a device cannot compute with the weights.
        ModelLoadError: the checkpoint cannot be served.
    """
    folder = checkpoint_folder(model, with_weights=False)
    hf_config = read_json(folder, "config.json") or {}
    model_class, config = resolve_model(hf_config)
    check_fp8(config, devices)
    resolved = resolve_dtype(dtype, hf_config, Device("cuda", 0))
    token_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    weights = weight_bytes(model_class, config, torch_reference.Backend(), resolved)
    return weights, token_elements * resolved.itemsize


def resolve_dtype(option: str, hf_config: dict[str, Any], device: Device) -> torch.dtype:
    """The type of weights and KV: as asked for, else the checkpoint's on a GPU and float32 on a CPU.

    Raises:
        ModelLoadError: the checkpoint names a type that is not served.
    """
    named = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    if not isinstance(named, str) or not isinstance(getattr(torch, named, None), torch.dtype):
        raise ModelLoadError(
            f"config.json: dtype={short_repr(named)} is no type of torch; write float32, float16 or bfloat16"
        )
    name = option if option != "auto" else named if device.is_cuda else "float32"
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if not isinstance(name, str) or name not in dtypes:
        raise ModelLoadError(f"config.json: dtype={short_repr(name)} is not one of {', '.join(dtypes)}; pass dtype=...")
    return dtypes[name]


def resolve_max_model_len(option: int | None, model_config: ModelDescription) -> int:
    """Maximum tokens of a request: as asked for, else the least of 4096, the model's limit and its window.

    Raises:
        ConfigError: more than the model's positions, or more than its layers attend to.
    """
    rope, most = model_config.rope, model_config.max_position_embeddings
    # Models of the time before llama3 give the positions before they were stretched, or those after: Vicuna's 16k says
    # 4096. Which of the two it is the config does not tell.
    unstretched = {"linear": most, "yarn": rope.original_max_positions}.get(rope.rope_type, 0)
    most = max(most, int(unstretched * rope.factor))
    window = model_config.sliding_window
    if option is None:
        default = min(DEFAULT_MAX_MODEL_LEN, most)
        if window is None or window >= default:
            return default
        logger.warning(
            "max_model_len=%d: the model has sliding_window=%d, longer requests are not served", window, window
        )
        return window
    if window is not None and option > window:
        raise ConfigError(
            f"max_model_len={option} is above the model's sliding_window={window}, and windows that are used are not "
            f"supported; pass at most {window}"
        )
    if option > most:
        raise ConfigError(f"max_model_len={option} is above the model's {most} positions; pass at most that")
    return option


def build_runners(
    config: EngineConfig, spec: RunnerSpec, devices: tuple[Device, Device]
) -> tuple[ModelRunner, ModelRunner, tuple[KVTransfer, KVTransfer]]:
    """Prefill runner, decode runner and the KV transfers between them, from the former to the latter and back; on one
    device both runners are one object.

    This is the one place that asks how many devices there are.
    """
    prefill_device, decode_device = devices
    if config.tensor_parallel_size > 1:
        runner = build_ranks(config, spec, decode_device)
        return runner, runner, (NoTransfer(), NoTransfer())
    if prefill_device == decode_device:
        runner = ModelRunner(
            spec, decode_device, is_decode_runner=True, max_prefill_tokens=config.max_num_batched_tokens
        )
        return runner, runner, (NoTransfer(), NoTransfer())
    if config.card_roles == "elastic":
        return build_elastic_runners(config, spec, devices)
    method = resolve_handoff(config.kv_handoff, prefill_device, decode_device)
    # A request that failed once is prefilled here, in chunks.
    chunk_tokens = min(config.prefill_chunk_tokens, config.max_num_batched_tokens)
    pipeline = None
    if config.pipeline_mode != "disabled":
        pipeline = PipelineOptions(
            config.decode_attention_sm,
            config.decode_ffn_sm,
            config.decode_micro_batches,
            config.decode_pipeline_profiling,
            adaptive=config.pipeline_mode == "auto",
        )
    decode_runner = ModelRunner(
        spec, decode_device, is_decode_runner=True, max_prefill_tokens=chunk_tokens, pipeline=pipeline
    )
    prefill_runner = ModelRunner(
        spec,
        prefill_device,
        is_decode_runner=False,
        max_prefill_tokens=config.max_num_batched_tokens,
        weights_of=decode_runner,
        push_to=decode_runner if method == "direct" else None,
    )
    transfer = PeerTransfer(prefill_runner, decode_runner, method, verify=config.verify_kv_handoff)
    return prefill_runner, decode_runner, (transfer, NoTransfer())


def build_elastic_runners(
    config: EngineConfig, spec: RunnerSpec, devices: tuple[Device, Device]
) -> tuple[ModelRunner, ModelRunner, tuple[KVTransfer, KVTransfer]]:
    """Two runners that both prefill and decode, and push the KV of prompts that they share into each other's pool."""
    reason = reason_not_to_share(config, spec, devices)
    if reason is not None:
        logger.warning("card_roles='elastic': prompts are not shared, each runs on one card: %s", reason)
    # A card that does not answer is lost after `step_timeout_s`: the other one gives up on its layers before.
    limit_s = None if reason is not None else min(config.handoff_timeout_s, config.step_timeout_s / 2, MAX_WAIT_S)
    runners: list[ModelRunner] = []
    for device in reversed(devices):
        runners.append(
            ModelRunner(
                spec,
                device,
                is_decode_runner=True,
                max_prefill_tokens=config.max_num_batched_tokens,
                weights_of=runners[0] if runners else None,
                share_limit_s=limit_s,
            )
        )
    decode_runner, prefill_runner = runners
    if reason is not None:
        return prefill_runner, decode_runner, (NoTransfer(), NoTransfer())
    prefill_runner.share_prompts_with(decode_runner)
    decode_runner.share_prompts_with(prefill_runner)
    there = PeerTransfer(prefill_runner, decode_runner, "direct", verify=config.verify_kv_handoff)
    back = PeerTransfer(decode_runner, prefill_runner, "direct", verify=config.verify_kv_handoff)
    return prefill_runner, decode_runner, (there, back)


def reason_not_to_share(config: EngineConfig, spec: RunnerSpec, devices: tuple[Device, Device]) -> str | None:
    """Why two devices cannot compute one prompt together; None if they can."""
    first, second = devices
    if first.is_cuda and not (peer_access(first, second) and peer_access(second, first)):
        return f"{first} and {second} have no peer access"
    chunk_tokens = min(config.prefill_chunk_tokens, config.max_num_batched_tokens, MAX_STREAMED_PREFILL_TOKENS)
    if chunk_tokens <= spec.attention.block_size:
        return f"chunks of {chunk_tokens} tokens are no more than a block of {spec.attention.block_size}"
    return None


def build_ranks(config: EngineConfig, spec: RunnerSpec, device: Device) -> ModelRunner:
    """The runner of rank 0; the other ranks run in worker processes and follow it.

    Raises:
        WorkerError: a rank did not start; the message has its traceback.
    """
    make_runner = functools.partial(_rank_runner, spec, config.max_num_batched_tokens, device)
    workers = Workers(spec.num_ranks, make_runner, functools.partial(_device_of, device), config.step_timeout_s)
    try:
        runner = _rank_runner(spec, config.max_num_batched_tokens, device, workers.ranks, workers)
        workers.started()
        return runner
    except BaseException as error:
        failure = error
        if isinstance(error, Exception) and not isinstance(error, NanoVLLMError):
            failure = workers.diagnose(error)
        traceback.clear_frames(error.__traceback__)  # they hold graphs
        workers.abandon()
        if failure is error:
            raise
        raise failure from error


def _device_of(first: Device, rank: int) -> Device:
    return Device(first.kind, rank)


def _rank_runner(
    spec: RunnerSpec, max_prefill_tokens: int, first: Device, ranks: Ranks, workers: WorkerGroup | None = None
) -> ModelRunner:
    return ModelRunner(
        spec,
        _device_of(first, ranks.rank),
        is_decode_runner=True,
        max_prefill_tokens=max_prefill_tokens,
        ranks=ranks,
        workers=workers,
    )


def check_ranks(num_ranks: int, config: ModelDescription, device: Device) -> None:
    """Checks that the model can be divided among `num_ranks` ranks.

    Raises:
        ConfigError: there are not as many GPUs, or they do not divide heads, FFN rows or vocabulary.
    """
    num_gpus = torch.cuda.device_count() if device.is_cuda else num_ranks
    if num_ranks > num_gpus:
        raise ConfigError(f"tensor_parallel_size={num_ranks}, but torch sees {num_gpus} GPUs; pass at most that")
    uneven = [f"{number} {what}" for what, number in config.divided.items() if number % num_ranks]
    if uneven:
        raise ConfigError(
            f"tensor_parallel_size={num_ranks} does not divide {', '.join(uneven)}; pass one that divides "
            f"{math.gcd(*config.divided.values())}"
        )


def build_placement(config: EngineConfig, prefill_runner: ModelRunner, decode_runner: ModelRunner) -> Placement:
    """A card for each runner, and the roles of the cards."""
    if prefill_runner is decode_runner:
        card = make_card(config, decode_runner, f"device {decode_runner.device}")
        return Placement(card, card)
    if config.card_roles == "elastic":
        first, second = (
            make_card(config, runner, f"device {runner.device}") for runner in (prefill_runner, decode_runner)
        )
        return ElasticPlacement(first, second, can_share=decode_runner.arrivals is not None)
    return Placement(
        make_card(config, prefill_runner, f"prefill device {prefill_runner.device}"),
        make_card(config, decode_runner, f"decode device {decode_runner.device}"),
    )


def make_card(config: EngineConfig, runner: ModelRunner | RemoteRunner, label: str) -> Card:
    """The card of a runner, with a block manager for its pool; `label` is its name in a trace."""
    block_manager = BlockManager(runner.num_kv_blocks, runner.block_size, config.enable_prefix_caching)
    return Card(
        str(runner.device),
        label,
        block_manager,
        runner.max_prefill_tokens,
        step_time=StepTimeModel(model_costs(runner.spec)),
    )


def model_costs(spec: RunnerSpec) -> ModelCosts:
    """What the attention of the model that is served costs, relative to its weights and GEMMs."""
    config, backend = spec.model_config, torch_reference.Backend()
    unquantized = dataclasses.replace(config, quantization=None)
    weights, wide_weights = (weight_bytes(spec.model_class, one, backend, spec.dtype) for one in (config, unquantized))
    token_bytes = spec.num_ranks * spec.block_bytes / spec.attention.block_size
    attention_flops = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    # Of experts those count that one token passes.
    num_unread = config.num_read(math.inf) - config.num_read(1)
    itemsize = spec.dtype.itemsize if config.quantization is None else 1
    weights -= num_unread * itemsize
    num_weights = wide_weights / spec.dtype.itemsize - num_unread
    costs = ModelCosts(token_bytes / weights, attention_flops / (2 * num_weights))
    if not isinstance(config.ffn, ExpertsConfig):
        return costs
    ffn = config.ffn
    in_experts = ffn.num_parameters(config.hidden_size) - ffn.num_unquantized(config.hidden_size)
    return dataclasses.replace(
        costs,
        expert_share=config.num_hidden_layers * in_experts * itemsize / weights,
        num_experts=ffn.num_experts,
        experts_per_token=ffn.num_per_token,
    )


def step_time_fingerprint(config: EngineConfig, runner: ModelRunner) -> dict[str, Any]:
    """What the step times of a runner hold for."""
    about = fingerprint(runner.spec, runner.device)
    split = (config.decode_attention_sm, config.decode_ffn_sm, config.decode_micro_batches)
    pipeline = [config.pipeline_mode, *split] if runner.is_decode_runner else None
    return {**about, "what": "step times", "num_ranks": runner.spec.num_ranks, "pipeline": pipeline}


def build_scheduler(config: EngineConfig, placement: Placement) -> Scheduler:
    limits = SchedulerLimits(
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        max_num_seqs=config.max_num_seqs,
        max_handoff_backlog=config.max_handoff_backlog,
        verifies_handoffs=config.verify_kv_handoff,
        itl_target_s=None if config.itl_target_ms is None else config.itl_target_ms * 1e-3,
    )
    return Scheduler(limits, placement)
