"""How answers go out: server-sent events while the reply grows, or one object at its end.

Both watch the connection: when the client leaves, the sequences of its request are cancelled and their pages free.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from .desk import Batch
from .problems import problem_of

PATIENCE = 2.0  # seconds in which an early error can still have its own status


def dumps(value: Any) -> str:
    """Compact JSON on one line. NaN would be a bug: no client can read it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@asynccontextmanager
async def watched(batch: Batch, receive: Receive) -> AsyncIterator[None]:
    """While inside, a client that leaves cancels `batch`. So does leaving early."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        batch.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        batch.cancel()  # does nothing if all has ended


class EventStream:
    """An ASGI response: `objects` as they come, one per event, then [DONE]. None among them keeps the line alive."""

    def __init__(
        self,
        request: Request,
        batch: Batch,
        objects: AsyncIterator[dict[str, Any] | None],
        report: Callable[[Exception], None],
    ) -> None:
        """`report` is told of an error amid the reply; the client gets it as a last event."""
        self._receive = request.receive
        self._batch = batch
        self._objects = objects
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # proxies shall not collect the events
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        def part(text: str) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        async with watched(self._batch, self._receive):
            try:
                async for item in self._objects:
                    await part(": waiting\n\n" if item is None else f"data: {dumps(item)}\n\n")
            except Exception as err:
                self._report(err)
                await part(f"data: {dumps(problem_of(err).body)}\n\n")
            await part("data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
