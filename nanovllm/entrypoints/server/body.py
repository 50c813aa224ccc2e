"""Reads the JSON body of a request within limits of size and time."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request

from nanovllm.entrypoints.server.cut import Cut
from nanovllm.entrypoints.server.problems import Problem
from nanovllm.errors import short_repr

CLOSE = {"Connection": "close"}
"""The rest of a body that is not wanted is not read."""


async def read_object(request: Request, most_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The JSON object that a request has sent.

    Raises:
        Problem: it is too large (413), too slow (408), or no JSON object (400).
        ClientDisconnect: the client has left before its end.
    """
    data = await _read_in_time(request, most_bytes, timeout_s)
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(400, f"the body is not JSON: {error}") from error
    except RecursionError:
        raise Problem(400, "the body is JSON that is nested too deeply") from None
    if not isinstance(found, dict):
        raise Problem(400, f"the body is {short_repr(found)}, not a JSON object")
    return found


async def _read_in_time(request: Request, most_bytes: int, timeout_s: float) -> bytes:
    with Cut() as cut:
        timer = asyncio.get_running_loop().call_later(timeout_s, cut.strike)
        try:
            return await _read(request, most_bytes)
        finally:
            timer.cancel()
    raise Problem(408, f"the body has not come within {timeout_s:g} s", headers=CLOSE)


async def _read(request: Request, most_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > most_bytes:
        raise _too_large(most_bytes)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            raise _too_large(most_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(most_bytes: int) -> Problem:
    return Problem(413, f"the body is larger than the {most_bytes} bytes that --max-body-bytes allows", headers=CLOSE)
