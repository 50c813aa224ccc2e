"""The loop: takes requests, launches what the scheduler decides, collects what has ended, gives out tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner, RunnerSpec, SampledRow, StepHandle
from nanovllm.engine.scheduler import DecodeStep, PrefillStep, Scheduler, SchedulerLimits
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.tokenizer import (
    NoText,
    RequestText,
    StreamedText,
    WholeText,
    encode,
    end_of_sequence_ids,
    load_tokenizer,
)
from nanovllm.errors import ConfigError, EngineClosedError, ModelLoadError, RequestError, UnknownRequestError
from nanovllm.kernels import BackendRequirements, resolve_backend
from nanovllm.models import resolve_model
from nanovllm.models.qwen3 import Qwen3Config
from nanovllm.outputs import FinishReason, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.device import Device, resolve_device
from nanovllm.utils.loader import checkpoint_folder, read_json

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 4096
Prompt = str | SequenceOf[int]


@dataclass
class Counters:
    """What the engine has run since it was made; tokens found in a prefix cache are not counted."""

    prefill_steps: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0


@dataclass(frozen=True)
class InFlight:
    """A launched step and the handle to collect it by."""

    step: PrefillStep | DecodeStep
    handle: StepHandle


class LLMEngine:
    """Serves requests one `step()` at a time.

    Args:
        model: folder of a Hugging Face checkpoint.
        **options: see `EngineConfig`.

    Raises:
        ConfigError: an option is unknown, out of range or cannot be honoured.
        ModelLoadError: the checkpoint cannot be served.
        BackendUnavailableError: the attention backend that was asked for cannot serve.
        OutOfKVCacheError: the KV pool does not fit.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._closed = True
        self.config = EngineConfig.from_options(model, options)
        folder = checkpoint_folder(self.config.model)
        hf_config = read_json(folder, "config.json") or {}
        device = resolve_device(self.config.device)
        spec = runner_spec(self.config, folder, hf_config, device)
        self.model_config = spec.model_config
        self.max_model_len = spec.max_model_len
        self.tokenizer = load_tokenizer(folder)
        self._eos_ids = frozenset(end_of_sequence_ids(folder, hf_config, self.tokenizer))
        self.prefill_runner, self.decode_runner = build_runners(spec, device)
        self.scheduler = build_scheduler(self.config, spec, self.prefill_runner, self.decode_runner)
        self.counters = Counters()
        self._next_request_id = 0
        self._sequences: dict[int, Sequence] = {}
        self._texts: dict[int, RequestText] = {}
        self._in_flight: list[InFlight] = []
        self._outputs: list[RequestOutput] = []
        self._closed = False

    # Requests

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues a prompt, text or token ids, and returns the id that `step()` will name it by.

        Raises:
            RequestError: the prompt or a parameter is refused; nothing was queued.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        return self._enqueue(self._checked_prompt(prompt), self._checked_params(sampling_params), streamed=True)

    def abort(self, request_id: int) -> None:
        """Ends a request where it is; its last output, with `finish_reason="abort"`, comes from the next `step()`.

        Raises:
            UnknownRequestError: no unfinished request has this id.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        seq = self._sequences.get(request_id) if isinstance(request_id, int) else None
        if seq is None or seq.is_finished:
            raise UnknownRequestError(f"request {request_id!r} is not known or has ended; abort takes a running one")
        self._finish(seq, "abort")

    def is_finished(self) -> bool:
        """Whether no request is left to serve and no output to give out."""
        return not (self._outputs or self._sequences or self.scheduler.has_unfinished())

    def step(self) -> list[RequestOutput]:
        """Launches what can be launched and returns what has completed since the last call, perhaps nothing.

        Waits for the device only when there was nothing to launch.

        Raises:
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        self._advance()
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Aborts everything, waits for the device, gives its memory back. A second call does nothing."""
        if self._closed:
            return
        for seq in self.scheduler.unfinished():
            self.scheduler.finish(seq, "abort")
        for work in self._in_flight:
            work.handle.wait()
        self._closed = True
        for runner in {self.prefill_runner, self.decode_runner}:
            runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Checking what comes in

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("this engine was closed; make a new one")

    def _checked_params(self, params: object) -> SamplingParams:
        if params is None:
            params = SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params={params!r} is not a SamplingParams")
        vocab_size = self.model_config.vocab_size
        for token_id in params.stop_token_ids:
            if token_id >= vocab_size:
                raise RequestError(f"stop_token_ids has {token_id}; the vocabulary has {vocab_size} tokens")
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise RequestError(f"logprobs={params.logprobs} is above the vocabulary's {vocab_size} tokens")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, which this checkpoint lacks; use stop_token_ids")
        return params

    def _checked_prompt(self, prompt: object, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt that can be served."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; it needs at least one token")
            token_ids = encode(self.tokenizer, prompt, add_special_tokens=add_special_tokens)
        elif isinstance(prompt, (list, tuple)):
            token_ids = [self._checked_token_id(token) for token in prompt]
        else:
            raise RequestError(f"a prompt of type {type(prompt).__name__} is neither text nor a list of token ids")
        if not token_ids:
            raise RequestError("the prompt is empty; it needs at least one token")
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len={self.max_model_len} at most "
                f"{self.max_model_len - 1} leave room for an answer"
            )
        for pool in (self.scheduler.prefill_pool, self.scheduler.decode_pool):
            if pool.blocks_for(len(token_ids)) > pool.num_blocks:
                raise RequestError(
                    f"the prompt has {len(token_ids)} tokens; the KV pool holds {pool.num_blocks * pool.block_size}; "
                    "raise num_kvcache_blocks or gpu_memory_utilization"
                )
        return token_ids

    def _checked_token_id(self, token: object) -> int:
        vocab_size = self.model_config.vocab_size
        if isinstance(token, bool) or not isinstance(token, int):
            raise RequestError(f"the prompt has {token!r}, which is not a token id (an integer)")
        if not 0 <= token < vocab_size:
            raise RequestError(f"the prompt has token id {token}; the vocabulary has ids 0 to {vocab_size - 1}")
        return token

    def _enqueue(self, token_ids: list[int], params: SamplingParams, *, streamed: bool) -> int:
        request_id = self._next_request_id
        self._next_request_id += 1
        seq = Sequence(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=params.seed if params.seed is not None else derived_seed(self.config.seed, request_id),
            arrival_s=time.perf_counter(),
            stop_token_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids),
        )
        self._sequences[request_id] = seq
        self._texts[request_id] = self._request_text(params, streamed)
        self.scheduler.add(seq)
        return request_id

    def _request_text(self, params: SamplingParams, streamed: bool) -> RequestText:
        if self.tokenizer is None:
            return NoText()
        if streamed or params.stop:
            return StreamedText(self.tokenizer, tuple(params.stop))
        return WholeText(self.tokenizer)

    # The loop

    def _advance(self) -> None:
        """One turn: launch, then collect what has ended; wait for the oldest step if nothing was launched."""
        launched = self._launch_prefill()
        launched = self._launch_decode() or launched
        if not launched and self._in_flight:
            self._in_flight[0].handle.wait()
        self._collect()
        for seq in self.scheduler.get_prefilled_sequences():
            self.scheduler.handoff_done(seq)
        for seq in self.scheduler.get_failed_sequences():
            self._give_out(seq, [])

    def _launch_prefill(self) -> bool:
        if any(isinstance(work.step, PrefillStep) for work in self._in_flight):
            return False
        step = self.scheduler.schedule_prefill()
        return step is not None and self._launch(self.prefill_runner, step)

    def _launch_decode(self) -> bool:
        if any(isinstance(work.step, DecodeStep) for work in self._in_flight):
            return False
        step = self.scheduler.schedule_decode()
        return step is not None and self._launch(self.decode_runner, step)

    def _launch(self, runner: ModelRunner, step: PrefillStep | DecodeStep) -> bool:
        """Launches a step. If that fails, its halves, until the request that makes it fail stands alone."""
        try:
            handle = runner.launch(step)
        except Exception as error:  # noqa: BLE001 - whatever a forward pass raises ends one request, not the engine
            halves = step.halves()
            if halves is not None:
                launched = [self._launch(runner, half) for half in halves]
                return any(launched)
            self._step_failed(step.sequences()[0], error)
            return False
        self._in_flight.append(InFlight(step, handle))
        return True

    def _step_failed(self, seq: Sequence, error: Exception) -> None:
        retry = seq.failures == 0
        logger.warning("request %d failed (%s); %s", seq.request_id, error, "retrying" if retry else "giving up")
        self.scheduler.step_failed(seq, error, retry)

    def _collect(self) -> None:
        ended = [work for work in self._in_flight if work.handle.is_done()]
        for work in ended:
            self._in_flight.remove(work)
            rows = work.handle.collect()
            if isinstance(work.step, PrefillStep):
                self._prefill_ended(work.step, rows)
            else:
                self._decode_ended(work.step, rows)

    def _prefill_ended(self, step: PrefillStep, rows: list[SampledRow]) -> None:
        self.counters.prefill_steps += 1
        remaining = iter(rows)
        for chunk in step.chunks:
            self.counters.prefill_tokens += chunk.end - chunk.start
            self.scheduler.prefill_done(chunk)
            if chunk.is_last:
                self._append(chunk.seq, next(remaining))

    def _decode_ended(self, step: DecodeStep, rows: list[SampledRow]) -> None:
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(rows)
        for seq, row in zip(step.seqs, rows, strict=True):
            self.scheduler.decode_done(seq)
            self._append(seq, row)

    def _append(self, seq: Sequence, row: SampledRow) -> None:
        """Gives a request its next token and ends it if that was the last."""
        if seq.is_finished:
            return
        now = time.perf_counter()
        if seq.first_token_s is None:
            seq.first_token_s = now
        seq.token_ids.append(row.token_id)
        if row.logprobs is not None and seq.params.logprobs is not None:
            seq.logprobs.append(row.logprobs.first(seq.params.logprobs))
        self.scheduler.token_appended(seq)
        is_stop_token = row.token_id in seq.stop_token_ids
        text = self._texts[seq.request_id]
        may_stop = seq.num_output_tokens >= seq.params.min_tokens
        piece = "" if is_stop_token else text.add([row.token_id], may_stop=may_stop)
        if is_stop_token or text.stopped:
            self._finish(seq, "stop", [row.token_id], piece)
        elif seq.num_output_tokens >= seq.params.max_tokens or seq.num_tokens >= self.max_model_len:
            self._finish(seq, "length", [row.token_id], piece)
        else:
            self._give_out(seq, [row.token_id], piece)

    def _finish(
        self, seq: Sequence, reason: FinishReason, new_token_ids: SequenceOf[int] = (), piece: str = ""
    ) -> None:
        self.scheduler.finish(seq, reason)
        self._give_out(seq, list(new_token_ids), piece)

    def _give_out(self, seq: Sequence, new_token_ids: list[int], piece: str = "") -> None:
        if seq.is_finished:
            seq.finished_s = time.perf_counter()
            piece += self._texts.pop(seq.request_id).finish()
            del self._sequences[seq.request_id]
        wants_logprobs = seq.params.logprobs is not None
        self._deliver(
            RequestOutput(
                request_id=seq.request_id,
                new_token_ids=new_token_ids,
                text=piece,
                finished=seq.is_finished,
                finish_reason=seq.finish_reason,
                error=seq.error,
                new_logprobs=seq.logprobs[-len(new_token_ids) :] if wants_logprobs and new_token_ids else None,
                ttft_s=None if seq.first_token_s is None else seq.first_token_s - seq.arrival_s,
                latency_s=None if seq.finished_s is None else seq.finished_s - seq.arrival_s,
            )
        )

    def _deliver(self, output: RequestOutput) -> None:
        self._outputs.append(output)


def runner_spec(config: EngineConfig, folder: Path, hf_config: dict[str, Any], device: Device) -> RunnerSpec:
    """Resolves every `auto` and None of the options against the checkpoint and the device.

    Raises:
        ConfigError: an option contradicts the checkpoint.
        ModelLoadError: the checkpoint cannot be served.
        BackendUnavailableError: the attention backend that was asked for cannot serve.
    """
    model_class, model_config = resolve_model(hf_config)
    dtype = resolve_dtype(config.dtype, hf_config, device)
    needs = BackendRequirements(device.kind, dtype, model_config.head_dim, config.kvcache_block_size)
    attention = resolve_backend(config.attention_backend, needs)
    logger.info(
        "%s on %s: attention backend %s (%s), %s, blocks of %d tokens",
        folder.name,
        device,
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
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_kvcache_blocks=config.num_kvcache_blocks,
    )


def resolve_dtype(option: str, hf_config: dict[str, Any], device: Device) -> torch.dtype:
    """The type of weights and KV: as asked for, else the checkpoint's on a GPU and float32 on a CPU.

    Raises:
        ModelLoadError: the checkpoint names a type that is not served.
    """
    named = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    name = option if option != "auto" else named if device.is_cuda else "float32"
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ModelLoadError(f"config.json: dtype={name!r} is not one of {', '.join(dtypes)}; pass dtype=...")
    return dtypes[name]


def resolve_max_model_len(option: int | None, model_config: Qwen3Config) -> int:
    """The longest request: as asked for, else 4096 or the model's limit.

    Raises:
        ConfigError: more than the model's positions.
    """
    rope = model_config.rope
    stretched = int(rope.original_max_positions * rope.factor) if rope.rope_type == "yarn" else 0
    most = max(model_config.max_position_embeddings, stretched)
    if option is None:
        return min(DEFAULT_MAX_MODEL_LEN, most)
    if option > most:
        raise ConfigError(f"max_model_len={option} is above the model's {most} positions; pass at most that")
    return option


def build_runners(spec: RunnerSpec, device: Device) -> tuple[ModelRunner, ModelRunner]:
    """Prefill runner and decode runner; on one device they are one object."""
    runner = ModelRunner(spec, device, is_decode_runner=True)
    return runner, runner


def build_scheduler(
    config: EngineConfig, spec: RunnerSpec, prefill_runner: ModelRunner, decode_runner: ModelRunner
) -> Scheduler:
    """A scheduler with one block manager for each pool."""
    pools = {
        runner: BlockManager(runner.num_kv_blocks, runner.block_size, config.enable_prefix_caching)
        for runner in (prefill_runner, decode_runner)
    }
    limits = SchedulerLimits(
        max_num_batched_tokens=config.max_num_batched_tokens,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=spec.max_model_len,
    )
    return Scheduler(limits, pools[prefill_runner], pools[decode_runner])


def derived_seed(engine_seed: int, request_id: int) -> int:
    """The seed of a request that has none of its own."""
    return xxhash.xxh64(request_id.to_bytes(8, "little"), seed=engine_seed).intdigest() >> 1
