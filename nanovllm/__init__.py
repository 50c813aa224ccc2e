"""nanovllm: a small, readable LLM inference engine."""

from nanovllm.engine.step_listeners import StepReport
from nanovllm.errors import (
    BackendUnavailableError,
    ConfigError,
    DeviceError,
    EngineBusyError,
    EngineClosedError,
    GreenContextError,
    HandoffError,
    HandoffTimeout,
    ModelLoadError,
    NanoVLLMError,
    NonFiniteLogitsError,
    OutOfKVCacheError,
    RequestError,
    UnknownRequestError,
    WorkerError,
)
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.version import __version__

__all__ = [
    "LLM",
    "BackendUnavailableError",
    "ConfigError",
    "DeviceError",
    "EngineBusyError",
    "EngineClosedError",
    "GreenContextError",
    "HandoffError",
    "HandoffTimeout",
    "ModelLoadError",
    "NanoVLLMError",
    "NonFiniteLogitsError",
    "OutOfKVCacheError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StepReport",
    "TokenLogprobs",
    "UnknownRequestError",
    "WorkerError",
    "__version__",
]
