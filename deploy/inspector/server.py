"""The inspector's server: the page and its data, on the loopback address alone.

    GET /                    the page; its parts under /static/
    GET /api/run             facts of the run, with its version as ETag: a poll costs nothing
    GET /api/metrics?key=    series of metrics
    GET /api/groups?...      a page of the table (`deploy.inspector.query.GroupQuery`)
    GET /api/groups/{id}     a group with all its tokens

Nothing is changed by any request. The Host header must name loopback, so that a web page elsewhere
cannot reach this server by a name of its own that resolves to it (DNS rebinding).
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common.errors import RunError, UserError, first_line
from deploy.inspector.query import GroupQuery
from deploy.inspector.run_data import RunData

ADDRESS, PORT = "127.0.0.1", 8471
HOSTS = ["127.0.0.1", "localhost"]
STATIC = Path(__file__).resolve().parent / "static"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_LARGEST_ID = 2**63 - 1
_LARGEST_PORT = 65_535


def build_app(data: RunData) -> FastAPI:
    """The web application that shows one run."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=STATIC))
    _add_errors(app)
    _add_routes(app, data)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)

    @app.middleware("http")
    async def add_headers(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    return app


def _add_routes(app: FastAPI, data: RunData) -> None:
    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    @app.get("/api/run")
    def run(request: Request) -> Response:
        etag = f'"{data.refresh().version}"'
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"ETag": etag})
        return JSONResponse(data.facts(), headers={"ETag": etag})

    @app.get("/api/metrics")
    def metrics(key: Annotated[list[str], Query(max_length=100)]) -> JSONResponse:
        return JSONResponse(data.series(key))

    @app.get("/api/groups")
    def groups(query: Annotated[GroupQuery, Query()]) -> JSONResponse:
        return JSONResponse(data.page(query))

    @app.get("/api/groups/{group_id}")
    def group(group_id: int) -> JSONResponse:
        found = data.group(group_id) if 0 <= group_id <= _LARGEST_ID else None
        if found is None:
            return _error(404, f"there is no group {group_id} in this run")
        return JSONResponse(found)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, "; ".join(_said(part) for part in error.errors()))

    @app.exception_handler(UserError)
    @app.exception_handler(RunError)
    def unreadable(request: Request, error: Exception) -> JSONResponse:
        return _error(500, first_line(error))


def _said(part: dict[str, Any]) -> str:
    return f"{part['loc'][-1]}={part.get('input')}: {part['msg']}"


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


def serve(run: Path, port: int) -> None:
    """Print the page's address and serve it until Ctrl-C.

    Args:
        run: run directory.
        port: of loopback; 0 takes a free one.

    Raises:
        UserError: no run in `run`, or the port cannot be had.
    """
    if not 0 <= port <= _LARGEST_PORT:
        raise UserError(f"--port {port}: a port is from 0 to {_LARGEST_PORT}")
    app = build_app(RunData(run))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port))
            listener.listen()  # before the address is told: who asks at once waits, not fails
        except OSError as error:
            raise UserError(
                f"port {port} cannot be had: {error.strerror}; --port 0 takes a free one"
            ) from error
        print(f"http://{ADDRESS}:{listener.getsockname()[1]}/ shows {run}; Ctrl-C ends", flush=True)
        config = uvicorn.Config(app, log_level="warning", lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])
