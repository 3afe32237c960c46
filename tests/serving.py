"""A real server on a free port, in a thread of the test; and a model whose replies are written down beforehand."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from exl_runtime.generation.request import Result, TokenLogprob
from exl_runtime.generation.stream import Finished, Prefilled, Started, Text
from exl_runtime.server.run import make_server
from exl_runtime.server.settings import Settings


class Serving:
    """A running server: `url` of its API, `lines` of its log."""

    def __init__(self, runtime: Any, settings: Settings, grace: int = 1) -> None:
        self.runtime = runtime
        self.lines: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.server = make_server(runtime, settings, log_line=self.lines.append, grace=grace)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    @property
    def desk(self) -> Any:
        """Where requests wait."""
        return self.server.config.app.state.place.desk

    def start(self) -> None:
        """Returns when the server answers."""
        self._thread.start()
        wait_for(lambda: self.server.started)

    def stop(self) -> None:
        """Returns when the server has ended."""
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._socket.close()


@contextmanager
def served(runtime: Any, grace: int = 1, **settings: Any) -> Iterator[Serving]:
    """Serve a runtime while inside."""
    serving = Serving(runtime, Settings(**{"name": runtime.info.name, **settings}), grace)
    serving.start()
    try:
        yield serving
    finally:
        serving.stop()


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Return when `condition()` holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class Scripted:
    """The tokenizer and template of a real runtime, but replies from a list: one event per few characters.

    `seen` keeps the options of every stream. A reply that is an exception is raised.
    """

    def __init__(self, real: Any, *replies: Any, template: Any = None) -> None:
        self.info, self.tokenizer = real.info, real.tokenizer
        self.template = real.template if template is None else template
        self.replies = list(replies)
        self.seen: list[dict[str, Any]] = []
        self.pause = 0.0

    def render(
        self, messages: Any, add_generation_prompt: bool = True, *, tools: Any = None, template_args: Any = None
    ) -> Any:
        """Through the template, and kept in `rendered`."""
        text, ids = self.template.encode(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_args=template_args
        )
        self.rendered = text
        return _Rendered(text, tuple(ids))

    def stream(self, prompt: Any, **options: Any) -> Any:
        """The next reply."""
        self.seen.append({"prompt": prompt, **options})
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return _Script(self, reply, len(prompt), options)


class _Rendered:
    def __init__(self, text: str, ids: tuple[int, ...]) -> None:
        self.text, self.ids = text, ids


class _Script:
    def __init__(self, owner: Scripted, reply: Any, length: int, options: dict[str, Any]) -> None:
        self._events = self._run(owner, reply, length, options)
        self._cancelled = False

    def __iter__(self) -> Any:
        return self._events

    def cancel(self) -> None:
        self._cancelled = True

    def _run(self, owner: Scripted, reply: Any, length: int, options: dict[str, Any]) -> Iterator[Any]:
        yield Started("r", length, 0)
        if isinstance(reply, Exception):
            raise reply
        yield Prefilled("r", 0.1)
        sent, ids = "", 0
        for start in range(0, len(reply), 5):
            if self._cancelled:
                break
            time.sleep(owner.pause)
            part = reply[start : start + 5]
            logprobs = (TokenLogprob(7, -0.5, ((7, -0.5), (8, float("-inf")))),) if options.get("logprobs") else None
            yield Text("r", part, (7,), logprobs)
            sent, ids = sent + part, ids + 1
        result = Result(
            text=sent,
            ids=(7,) * ids,
            stop_reason="cancelled" if self._cancelled else "eos",
            prompt_tokens=length,
            reused_tokens=0,
            generated_tokens=ids,
            seconds_prefill=0.1,
            seconds_decode=0.1,
        )
        yield Finished("r", result)
