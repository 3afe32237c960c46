"""Sockets, signals and uvicorn around the application. Blocks until the server is stopped."""

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import Any

from ..errors import UsageError
from .settings import Settings

MAX_HEADERS = 32 * 1024  # bytes of all headers of a request
MAX_CONNECTIONS = 512
IDLE = 30  # seconds a silent connection is kept
STALLED = 3  # seconds after the end of all replies for clients to fetch them


def require_extra() -> None:
    """Raise UsageError unless starlette and uvicorn are installed."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"exl serve needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint="pip install 'exl-runtime[server]'",
        )


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket; port 0: any free one. Raises UsageError when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as err:
        raise UsageError(
            f"there is no address {host!r}", hint="127.0.0.1 is this machine, 0.0.0.0 all its nets"
        ) from err
    opened = socket.socket(family, kind, proto)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as err:
        opened.close()
        why = "is in use" if err.errno == errno.EADDRINUSE else f"cannot be had: {err.strerror}"
        hint = "another --port, or --port 0 for any free one" if err.errno == errno.EADDRINUSE else None
        raise UsageError(f"port {port} of {host} {why}", hint=hint) from err
    return opened


def make_server(
    runtime: Any,
    settings: Settings,
    *,
    log_line: Callable[[str], None] = lambda line: None,
    grace: int = 5,
    ready: Callable[[], None] = lambda: None,
) -> Any:
    """A uvicorn server that is not running yet: `run(sockets=[...])` runs it, `should_exit = True` stops it.

    ready  is called once connections are accepted
    """
    import uvicorn

    from .app import build_app

    app = build_app(runtime, settings, log_line=log_line)
    config = uvicorn.Config(
        app,
        http="h11",  # its limits are the ones set here
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=grace + STALLED,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: "list[socket.socket] | None" = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: "list[socket.socket] | None" = None) -> None:
            app.state.place.desk.shut()
            timer = asyncio.get_running_loop().call_later(grace, app.state.place.desk.cancel)
            await super().shutdown(sockets)
            timer.cancel()

    return Server(config)


def serve(
    runtime: Any,
    settings: Settings,
    opened: socket.socket,
    *,
    ready: Callable[[str, int], None],
    log_line: Callable[[str], None],
    grace: int = 5,
) -> None:
    """Serve until Ctrl-C or SIGTERM; replies in progress then have `grace` seconds. A second signal ends them at once.

    ready  is called with host and port once connections are accepted
    """
    host, port = opened.getsockname()[:2]
    server = make_server(runtime, settings, log_line=log_line, grace=grace, ready=lambda: ready(host, port))
    with _own_signals(server):
        server.run(sockets=[opened])


@contextmanager
def _own_signals(server: Any) -> Iterator[None]:
    """uvicorn raises a signal again after it has stopped for it; by then it has done its work."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not server.should_exit:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
