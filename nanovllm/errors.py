"""The exception tree. Knows nothing about the rest of the package.

NanoVLLMError
├── ConfigError(ValueError)                an option of `LLM(...)`
├── ModelLoadError(ValueError)             a checkpoint: path, config, architecture, tensors
├── RequestError(ValueError)               a prompt or a sampling parameter
├── UnknownRequestError(KeyError)          a request id that is not, or no longer, known
├── EngineClosedError(RuntimeError)        use after `close()`, or a call that `close()` ended
├── EngineBusyError(RuntimeError)          a call that would wait for one further down the same thread's stack
├── NonFiniteLogitsError(ArithmeticError)  a request's logits are NaN or infinite
├── BackendUnavailableError(ImportError)   an attention backend that cannot serve here
├── OutOfKVCacheError(MemoryError)         the pool cannot be made, or a request cannot fit in it alone
├── DeviceError(RuntimeError)              a GPU that runs nothing any more
├── WorkerError(RuntimeError)              a tensor-parallel worker died
├── EngineProcessError(RuntimeError)       the process that an `AsyncLLM` has its engine in is gone, or failed
│   └── EngineTimeoutError(TimeoutError)   it does not answer
├── ClusterError(RuntimeError)             a card's process that cannot be started, or says what cannot be understood
├── GreenContextError(RuntimeError)        an SM partition that cannot be had
└── HandoffError(RuntimeError)             a request's KV did not reach the decode device
    └── HandoffTimeout(TimeoutError)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = [
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
    "UnknownRequestError",
    "WorkerError",
]


def short_repr(value: object) -> str:
    """`repr` for a message: cut where it is long, and of any integer (Python refuses to write out huge ones)."""
    try:
        text = repr(value)
    except ValueError:
        return f"<{type(value).__name__} too long to show>"
    return text if len(text) <= 200 else f"{text[:200]}..."


class NanoVLLMError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(NanoVLLMError, ValueError):
    """An option of `LLM(...)` is unknown, out of range or contradicts another."""


class ModelLoadError(NanoVLLMError, ValueError):
    """A checkpoint cannot be served: its path, config, architecture or tensors."""


class RequestError(NanoVLLMError, ValueError):
    """A prompt or a sampling parameter is refused."""


class UnknownRequestError(NanoVLLMError, KeyError):
    """No request of this id is known."""

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0]) if self.args else ""


class EngineClosedError(NanoVLLMError, RuntimeError):
    """The engine was closed, before the call or while it ran."""


class EngineBusyError(NanoVLLMError, RuntimeError):
    """A call would wait for another one further down its own thread's stack, such as from a signal handler."""


class NonFiniteLogitsError(NanoVLLMError, ArithmeticError):
    """The model's logits for a request are NaN or infinite: weights or a kernel are wrong, or a number overflowed."""


class BackendUnavailableError(NanoVLLMError, ImportError):
    """An attention backend cannot serve here; the message names every reason."""


class OutOfKVCacheError(NanoVLLMError, MemoryError):
    """The KV pool cannot be made, or a request cannot fit in it alone."""


class DeviceError(NanoVLLMError, RuntimeError):
    """A GPU runs nothing any more in this process: its context is lost, or a step on it does not end."""


class WorkerError(NanoVLLMError, RuntimeError):
    """A tensor-parallel worker died; the message carries its traceback."""


class EngineProcessError(NanoVLLMError, RuntimeError):
    """The process that an `AsyncLLM` or a server has its engine in is gone, or something in it failed."""


class EngineTimeoutError(EngineProcessError, TimeoutError):
    """The engine's process did not answer a question in time."""


class ClusterError(NanoVLLMError, RuntimeError):
    """The process of a card cannot be started, is of another version, or says what cannot be understood."""


class GreenContextError(NanoVLLMError, RuntimeError):
    """A driver call for an SM partition failed."""


class HandoffError(NanoVLLMError, RuntimeError):
    """A request's KV did not reach the decode device whole."""


class HandoffTimeout(HandoffError, TimeoutError):
    """A handoff did not end within `handoff_timeout_s`; the message carries both sides' state."""


@contextlib.contextmanager
def ends_with_message() -> Iterator[None]:
    """Ends the program with the message of an error that this package raises on purpose, without a traceback.

    Decorates the `main` of commands, examples and benchmarks.
    """
    try:
        yield
    except NanoVLLMError as error:
        sys.exit(f"error: {error}")
