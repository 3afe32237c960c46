"""Who may come in, and the log of who came. A layer around the whole application; knows no endpoint.

The server is for the programs of one user. A web page that user happens to visit must not reach it: pages of other
origins are refused (a request without reading its answer would already cost time), and so are names that lead here
by a trick of the name server (DNS rebinding).
"""

import hashlib
import hmac
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..console.terminal import clean_line
from .place import NOTE
from .problems import ApiError
from .settings import Settings

OPEN_PATHS = ("/health",)  # for monitors, which know no key


class Guard:
    """Checks host, origin and key, then lets the request through; logs every request without its content."""

    def __init__(self, app: ASGIApp, *, settings: Settings, log: Callable[[str], None]) -> None:
        self._app = app
        self._settings = settings
        self._log = log
        self._key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets here
            return
        started, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope[NOTE] = {}
        try:
            self._check(scope)
        except ApiError as err:
            await JSONResponse(err.body, err.status, headers=err.headers)(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)
        finally:
            seconds = time.monotonic() - started
            peer = scope["client"][0] if scope.get("client") else "-"
            note = scope[NOTE].get("text")
            line = f"{peer} {scope['method']} {scope['path']} {status or 'lost'} {seconds:.2f} s"
            self._log(clean_line(line if note is None else f"{line}, {note}"))

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        hosts, origins = self._settings.hosts, self._settings.origins
        host = _hostname(headers.get(b"host", ""))
        if hosts is not None and host not in hosts:
            raise ApiError(403, f"this server is not called {host!r:.100}; use 127.0.0.1", code="host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and "*" not in origins and origin not in origins:
            problem = f"web pages of {origin!r:.100} may not use this server; exl serve --allow-origin lets them"
            raise ApiError(403, problem, code="origin_not_allowed")
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get(b"authorization", "").partition(" ")
            if not given:
                raise _unauthorized("this server needs an API key: Authorization: Bearer KEY")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                raise _unauthorized("the API key is wrong")


def _unauthorized(problem: str) -> ApiError:
    return ApiError(401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _digest(text: str) -> bytes:
    """Equally long for all keys, so that comparing takes equally long too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _hostname(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
