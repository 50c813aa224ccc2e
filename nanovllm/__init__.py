"""nanovllm: a small, readable LLM inference engine."""

from typing import TYPE_CHECKING

from nanovllm.engine.step_listeners import StepReport
from nanovllm.errors import (
    BackendUnavailableError,
    ClusterError,
    ConfigError,
    DeviceError,
    EngineBusyError,
    EngineClosedError,
    EngineProcessError,
    EngineTimeoutError,
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

if TYPE_CHECKING:
    from nanovllm.entrypoints.async_llm import AsyncLLM as AsyncLLM

__all__ = [
    "LLM",
    "BackendUnavailableError",
    "ClusterError",
    "ConfigError",
    "DeviceError",
    "EngineBusyError",
    "EngineClosedError",
    "EngineProcessError",
    "EngineTimeoutError",
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


def __getattr__(name: str) -> object:
    if name == "AsyncLLM":  # its packages are an extra, so that it is not in `__all__`
        from nanovllm.entrypoints.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
