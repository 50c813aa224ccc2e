"""Calls of the CUDA driver, by cuda-python; error codes become exceptions."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import BackendUnavailableError


def call_driver(name: str, *arguments: Any) -> Any:
    """The result of a driver function, without its error code.

    Raises:
        BackendUnavailableError: the call failed.
    """
    from cuda.bindings import driver

    code, *values = getattr(driver, name)(*arguments)
    check_code(name, code)
    return values[0] if values else None


def check_code(name: str, code: Any) -> None:
    """Raises BackendUnavailableError unless a call of this name has succeeded."""
    if int(code):
        raise BackendUnavailableError(f"{name} failed: {getattr(code, 'name', code)} ({int(code)})")
