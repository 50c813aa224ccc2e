"""What a client is told when it does not get what it asked for: status and body, in the form of OpenAI's errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from nanovllm.errors import EngineClosedError, EngineProcessError, RequestError, UnknownRequestError

logger = logging.getLogger(__name__)


class Problem(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong, with the value, what is allowed and what to do.
        param: the parameter that it is about.
        code: a word for programs, such as `model_not_found`.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's word for errors of this status."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def as_dict(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def as_response(self) -> Response:
        return json_response(self.as_dict(), self.status, self.headers)


def problem_of(error: BaseException | None) -> Problem:
    """What a client is told of an exception, None being a request that ended without one."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestError):
        return Problem(400, str(error))
    if isinstance(error, UnknownRequestError):
        return Problem(404, str(error), code="request_not_found")
    if isinstance(error, (EngineProcessError, EngineClosedError)):
        return Problem(503, f"the server is stopping: {error}", code="stopping")
    logger.error("a request failed: %s: %s", type(error).__name__, error)
    return Problem(500, f"the request failed: {type(error).__name__}: {error}")


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
