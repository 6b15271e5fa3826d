"""The endpoint over HTTP: what an OpenAI client calls.

    POST /v1/chat/completions    a turn; `stream` gives it as one chunk
    GET  /v1/models              the one model there is

The key of the Authorization header names the session; an address may be that of one session alone.
Other routes of OpenAI's and of others' are not served, and say so. A client that goes away takes
its call with it: nobody would read what is sampled, so nothing of it is kept.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat import ChatCompletion
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from actors.endpoint.endpoint import Endpoint
from actors.endpoint.refusal import RefusedError, unknown_key

_LARGEST_BODY = 16 * 1024 * 1024
_SERVED = (
    "served are POST /v1/chat/completions and GET /v1/models alone: set the client to chat "
    "completions (not responses, not messages)"
)
_BODY_S = 30.0
"""Seconds in which a request must have come."""


def build_app(endpoint: Endpoint, own: str | None = None) -> FastAPI:
    """The web application of an endpoint.

    Args:
        own: the one key that is taken at this address; None takes that of every open session.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RefusedError)
    def refused(request: Request, refusal: RefusedError) -> JSONResponse:
        return JSONResponse(refusal.body(), status_code=refusal.status)

    @app.exception_handler(HTTPException)
    def no_route(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path}: {error.detail}; {_SERVED}"
        return refused(request, RefusedError(error.status_code, "unknown_url", said))

    @app.get("/v1/models")
    def models(request: Request) -> Any:
        endpoint.session(_key(request, own))
        model = {"id": endpoint.model, "object": "model", "created": 0, "owned_by": "grpo-lambda"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        key = _key(request, own)
        endpoint.session(key)  # before anything of a stranger's is read
        body = await _body(request)
        answer = await _while_connected(request, endpoint, key, body)
        if answer is None:
            return Response(status_code=499)  # nobody reads it
        if body.get("stream"):
            options = body.get("stream_options")
            usage = isinstance(options, dict) and bool(options.get("include_usage"))
            return StreamingResponse(_chunks(answer, usage), media_type="text/event-stream")
        return JSONResponse(answer.model_dump(mode="json", exclude_unset=True))

    return app


def _key(request: Request, own: str | None) -> str:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or own not in (None, key.strip()):
        raise unknown_key()
    return key.strip()


async def _body(request: Request) -> dict[str, Any]:
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > _LARGEST_BODY:
                    raise RefusedError(
                        413, "request_too_large", f"a request has at most {_LARGEST_BODY} bytes"
                    )
                parts.append(part)
    except TimeoutError as error:
        raise RefusedError(
            408, "timeout", f"the request did not come in {_BODY_S:.0f} s"
        ) from error
    except ClientDisconnect as error:
        raise RefusedError(499, "gone", "the client went away") from error
    try:
        read = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "invalid_json", f"the body is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise RefusedError(400, "invalid_value", "the body must be an object of JSON")
    return read


async def _while_connected(
    request: Request, endpoint: Endpoint, key: str, body: dict[str, Any]
) -> ChatCompletion | None:
    """The answer, or None where the client has gone. The endpoint's deadlines end both waits."""
    work = asyncio.ensure_future(endpoint.complete(key, body))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        work.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(answer: ChatCompletion, usage: bool) -> AsyncIterator[str]:
    """The whole answer as one chunk, and the use of tokens where that was asked for."""
    whole = answer.model_dump(mode="json", exclude_unset=True)
    (choice,) = whole.pop("choices")
    used = whole.pop("usage")
    whole["object"] = "chat.completion.chunk"
    delta = choice.pop("message")
    for index, call in enumerate(delta.get("tool_calls", [])):
        call["index"] = index
    yield _event(whole | {"choices": [choice | {"delta": delta}]})
    if usage:
        yield _event(whole | {"choices": [], "usage": used})
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
