"""The routes of the server, as an ASGI application. Makes no sockets; `run.py` does."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import small
from .chat import chat
from .completions import completions
from .desk import Desk
from .guard import Guard
from .place import Place
from .problems import ApiError, problem_of
from .settings import Settings
from .stream import EventStream, dumps

Endpoint = Callable[[Request], Awaitable[Any]]
log = logging.getLogger("exl_runtime")
LEFT = 499  # in the log, as other servers have it

ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/chat/completions", chat),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/embeddings", small.embeddings),
    ("GET", "/v1/models", small.models),
    ("GET", "/v1/models/{name:path}", small.model),
    ("POST", "/tokenize", small.tokenize),
    ("POST", "/detokenize", small.detokenize),
    ("GET", "/health", small.health),
)


def build_app(runtime: Any, settings: Settings, *, log_line: Callable[[str], None] = lambda line: None) -> Starlette:
    """The application for one model. `runtime` is a `Runtime`; it stays open when the server stops.

    log_line  is given one line per request: who, what, how long, how many tokens; never what was said
    """
    place = Place(
        runtime=runtime,
        settings=settings,
        desk=Desk(runtime, running=settings.parallel, waiting=settings.queue),
        created=int(time.time()),
        report=_report,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await place.desk.close()

    middleware = [Middleware(Guard, settings=settings, log=log_line)]
    if settings.origins:  # outermost: also refusals must be readable for pages that are allowed
        cors = {"allow_origins": settings.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, **cors))
    app = Starlette(
        routes=[Route(path, _answered(endpoint), methods=[method]) for method, path, endpoint in ROUTES],
        middleware=middleware,
        exception_handlers={HTTPException: _not_here},
        lifespan=lifespan,
    )
    app.state.place = place
    return app


def _answered(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint with its result as JSON, and its errors as the protocol writes them."""

    async def answer(request: Request) -> Any:
        try:
            made = await endpoint(request)
        except ClientDisconnect:  # amid its own body; nobody reads the answer, and the log shows why there is none
            return Response(status_code=LEFT)
        except Exception as err:
            _report(err)
            problem = problem_of(err)
            return JSONResponse(problem.body, problem.status, headers=problem.headers)
        if isinstance(made, EventStream):
            return made
        return Response(dumps(made), media_type="application/json")

    return answer


def _report(err: Exception) -> None:
    """Errors that are not the client's go to the log, with the place in the code but without any text of a prompt."""
    if problem_of(err).status < 500 or isinstance(err, ApiError):
        return
    step, place = err.__traceback__, "?"
    while step is not None:
        place, step = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}", step.tb_next
    log.error("a request failed: %s at %s", type(err).__name__, place)
    log.debug("the whole story", exc_info=err)


async def _not_here(request: Request, err: Exception) -> Response:
    """Unknown paths and wrong methods."""
    status = getattr(err, "status_code", 500)
    paths = ", ".join(f"{method} {path}" for method, path, _ in ROUTES)
    what = "wrong method for" if status == 405 else "nothing at"
    problem = ApiError(status, f"{what} {request.url.path!r:.200}; there is {paths}", code="not_found")
    return JSONResponse(problem.body, status, headers=getattr(err, "headers", None))
