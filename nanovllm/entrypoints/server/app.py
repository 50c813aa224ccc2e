"""The server's addresses: what each of them takes and gives. Knows nothing of sockets, signals or processes."""

from __future__ import annotations

import asyncio
import functools
import hmac
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.engine.requests import Prompt
from nanovllm.engine.text.tokenizer import check_text
from nanovllm.entrypoints.async_llm import AsyncLLM
from nanovllm.entrypoints.prometheus import Collector
from nanovllm.entrypoints.server.answers import Answers, AnswerSettings, Chat, Completion, Echo, TokenNames
from nanovllm.entrypoints.server.body import read_object
from nanovllm.entrypoints.server.chat_text import CALL, THINK, ChatText
from nanovllm.entrypoints.server.completions import (
    CLIENT_HAS_LEFT,
    Events,
    EventStream,
    Requests,
    answer_whole,
    event_of,
    with_server_send,
)
from nanovllm.entrypoints.server.gate import Gate
from nanovllm.entrypoints.server.live import Live
from nanovllm.entrypoints.server.parameters import TEMPLATE_OPTIONS, Asked, chat_of, completion_of
from nanovllm.entrypoints.server.problems import Problem, json_response, problem_of
from nanovllm.errors import NanoVLLMError, UnknownRequestError, short_repr

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
OPEN_TO_ALL = {"/health", "/"}
"""Paths that need no key."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the server serves, whatever the engine.

    Attributes:
        model_name: what the model is called.
        api_key: what clients send as `Authorization: Bearer ...`; None for no key.
        max_body_bytes: largest body of a request.
        body_timeout_s: seconds in which a body has to come.
        max_open_requests: requests that may run or wait; others get a 429.
    """

    model_name: str
    api_key: str | None = None
    max_body_bytes: int
    body_timeout_s: float
    max_open_requests: int


class Endpoints:
    """The functions behind the addresses. Everything that is wrong is raised, and told of by `make_app`'s handlers."""

    def __init__(self, llm: AsyncLLM, gate: Gate, settings: ServerSettings) -> None:
        self._llm = llm
        self._gate = gate
        self._settings = settings
        self._names = TokenNames(llm.tokenizer)
        self._template = "" if llm.tokenizer is None else str(llm.tokenizer.chat_template)
        self._live = Live(llm.metrics)
        self._started = int(time.time())
        self._run = secrets.token_hex(4)
        """Part of the names of answers, so that those of another run of the server are not taken for them."""

    async def completions(self, request: Request) -> Response:
        asked = completion_of(await self._body(request))
        self._check_model(asked.model)
        requests = Requests(self._gate, len(asked.prompts), asked.params.n, gives_tokens=not asked.is_echo_alone)
        echoes: list[Echo] = []
        try:
            for prompt in asked.prompts:
                special = asked.add_special_tokens
                token_ids = await requests.open(self._llm, prompt, asked.params, add_special_tokens=special)
                if asked.echoes:
                    echo = Echo(self._text_of(prompt), token_ids[0], asked.params.logprobs)
                    echoes += [echo] * asked.params.n
            answers = Completion(self._answer_settings("cmpl", requests, asked), echoes)
        except BaseException:
            requests.close()
            raise
        return await self._answer(request, requests, answers, asked)

    async def chat(self, request: Request) -> Response:
        asked = chat_of(await self._body(request), self._llm.max_model_len)
        self._check_model(asked.model)
        if asked.may_call and CALL not in self._template:
            message = f"tools are not served: the model's chat template does not speak of {CALL}"
            raise Problem(400, message, param="tools")
        requests = Requests(self._gate, 1, asked.params.n)
        try:
            prompt, token_ids = await self._llm.tokenize_chat(asked.messages, **asked.template_options)
            requests.open_tokenized(self._llm, token_ids, asked.params)
        except BaseException:
            requests.close()
            raise
        make_text = functools.partial(
            ChatText,
            finds_reasoning=THINK in self._template,
            in_reasoning=prompt.rstrip().endswith(THINK),
            finds_calls=asked.may_call,
        )
        answers = Chat(self._answer_settings("chatcmpl", requests, asked), make_text)
        return await self._answer(request, requests, answers, asked)

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(self._model())

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        known = {"model", "prompt", "messages", "add_special_tokens", *TEMPLATE_OPTIONS}
        _check_names(body, known)
        self._check_model(body.get("model"))
        text: Any
        if "messages" in body:
            options = {name: body[name] for name in TEMPLATE_OPTIONS if name in body}
            text, adds_special = await self._llm.render(body["messages"], **options), False
        else:
            text, adds_special = body.get("prompt"), body.get("add_special_tokens", True)
        if not isinstance(text, str) or not isinstance(adds_special, bool):
            raise Problem(400, "pass a text as prompt, or messages; add_special_tokens is true or false")
        tokenizer = check_text(self._llm.tokenizer, text)
        tokens = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=adds_special)
        return json_response({"count": len(tokens), "max_model_len": self._llm.max_model_len, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        _check_names(body, {"model", "tokens"})
        self._check_model(body.get("model"))
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
            raise Problem(400, f"tokens={short_repr(tokens)} is not a list of token ids", param="tokens")
        return json_response({"prompt": self._text_of(tokens)})

    async def health(self, request: Request) -> Response:
        if self._gate.is_draining or self._llm.death is not None:
            raise Problem(503, "the server is stopping", code="stopping")
        return json_response({"status": "ok"})

    async def page(self, request: Request) -> Response:
        """Shows the cards at work; asks for all else with the key that is typed there."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def live(self, request: Request) -> Response:
        samples = (event_of(sample) async for sample in self._live.samples())
        return StreamingResponse(samples, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def metrics(self, request: Request) -> Response:
        collector: Any = Collector(_Found(await self._llm.metrics()))
        return Response(generate_latest(collector), media_type=CONTENT_TYPE_LATEST)

    async def explain(self, request: Request) -> Response:
        name = request.path_params["name"]
        kind, _, rest = name.partition("-")
        run, _, number = rest.partition("-")
        if kind not in ("cmpl", "chatcmpl") or run != self._run or not number.isdecimal() or len(number) > 18:
            raise UnknownRequestError(f"no answer of this server has the id {short_repr(name)}")
        timeline = await self._llm.explain(int(number))
        spans = [{"what": span.what, "start_s": span.start_s, "end_s": span.end_s} for span in timeline.spans()]
        return json_response({"id": name, "spans": spans, "table": str(timeline)})

    async def _answer(self, request: Request, requests: Requests, answers: Answers, asked: Asked) -> Response:
        if asked.streams:
            return EventStream(Events(requests, answers), requests)
        return await answer_whole(request, requests, answers)

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_object(request, self._settings.max_body_bytes, self._settings.body_timeout_s)

    def _answer_settings(self, kind: str, requests: Requests, asked: Asked) -> AnswerSettings:
        return AnswerSettings(
            name=f"{kind}-{self._run}-{requests.streams[0].request_id}",
            model=self._settings.model_name,
            names=self._names,
            wants_logprobs=asked.params.logprobs is not None,
            num_prompt_logprobs=asked.prompt_logprobs,
            includes_usage=asked.includes_usage,
        )

    def _model(self) -> dict[str, Any]:
        about = {"id": self._settings.model_name, "object": "model", "created": self._started, "owned_by": "nanovllm"}
        return {**about, "max_model_len": self._llm.max_model_len}

    def _check_model(self, name: Any) -> None:
        if name is not None and name != self._settings.model_name:
            message = f"model {short_repr(name)} is not served here; {self._settings.model_name!r} is"
            raise Problem(404, message, param="model", code="model_not_found")

    def _text_of(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        tokenizer = check_text(self._llm.tokenizer, "")
        return str(tokenizer.decode(list(prompt), skip_special_tokens=False))


class _Found:
    """Metrics that are there already, as `Collector` asks for them."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def metrics(self) -> dict[str, Any]:
        return self._found


class KeyCheck:
    """Lets requests through that have the key; for an application of ASGI."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["path"] in OPEN_TO_ALL or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        problem = Problem(401, "the API key is missing or wrong; send it as Authorization: Bearer <key>")
        await problem.as_response()(scope, receive, send)


def make_app(llm: AsyncLLM, gate: Gate, settings: ServerSettings) -> ASGIApp:
    """The application that uvicorn serves."""
    at = Endpoints(llm, gate, settings)
    routes = [
        Route("/v1/completions", at.completions, methods=["POST"]),
        Route("/v1/chat/completions", at.chat, methods=["POST"]),
        Route("/v1/models", at.models),
        Route("/v1/models/{name:path}", at.model),
        Route("/tokenize", at.tokenize, methods=["POST"]),
        Route("/detokenize", at.detokenize, methods=["POST"]),
        Route("/", at.page),
        Route("/live", at.live),
        Route("/health", at.health),
        Route("/metrics", at.metrics),
        Route("/explain/{name}", at.explain),
    ]
    handlers: Any = {
        Problem: _tell,
        NanoVLLMError: _tell,
        HTTPException: _tell_of_address,
        ClientDisconnect: _tell_nobody,
        Exception: _tell,
    }
    checks = [] if settings.api_key is None else [Middleware(KeyCheck, api_key=settings.api_key)]
    return with_server_send(Starlette(routes=routes, exception_handlers=handlers, middleware=checks))


async def _tell(request: Request, error: Exception) -> Response:
    return problem_of(error).as_response()


async def _tell_of_address(request: Request, error: HTTPException) -> Response:
    return Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}").as_response()


async def _tell_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_HAS_LEFT)


def _check_names(body: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(body.keys() - known)
    if unknown:
        raise Problem(400, f"unknown parameter {short_repr(unknown[0])}; known: {', '.join(sorted(known))}")
