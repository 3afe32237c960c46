"""A runtime without a model: one token per character, replies from a list. The interface of `Runtime`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from exl_runtime.errors import PromptTooLong, StorageError, UsageError
from exl_runtime.generation.request import Result
from exl_runtime.generation.stream import Dropped, Finished, Prefilled, Started, Text
from exl_runtime.sampling.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Info:
    name: str = "fake-model"
    path: str = "models/fake-model"
    architecture: str = "FakeForCausalLM"
    format: str = "exl2"
    bits_per_weight: float = 4.25
    context: int = 400
    cache: str = "fp32"
    backend: str = "cpu"
    device: str = "cpu"
    weight_bytes: int = 3_400_000
    cache_bytes: int = 12_000_000
    load_seconds: float = 0.42
    is_demo: bool = False


@dataclass(frozen=True)
class Stats:
    requests: int = 3
    generated_tokens: int = 42
    decode_tokens_per_second: float = 96.0


@dataclass(frozen=True)
class Rendered:
    text: str
    ids: tuple[int, ...]


class FakeTokenizer:
    vocab_size = 0x110000
    special_ids = frozenset({0})

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        return "".join(chr(i) for i in ids if i)

    def piece(self, index: int) -> str:
        return chr(index)


@dataclass
class FakeRuntime:
    """`replies` are given in turn, the last one for ever; a reply that is an exception is raised after its text.

    `seen` keeps what was asked: the prompts as they came and the options.
    """

    replies: list[Any] = field(default_factory=lambda: ["hello"])
    info: Info = field(default_factory=Info)
    delay: float = 0.0
    prefill_delay: float = 0.0
    seen: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    closed: bool = False
    remembered: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)  # snapshots

    def __post_init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.stats = Stats()
        self._cached: tuple[int, ...] = ()

    def __enter__(self) -> "FakeRuntime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def render(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True, *, template_args: Any = None
    ) -> Rendered:
        text = "".join(f"[{name}={value}]" for name, value in (template_args or {}).items())
        text += "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        text += "<assistant>" if add_generation_prompt else ""
        return Rendered(text, tuple(map(ord, text)))

    def head(self, messages: list[dict[str, str]], ids: Any, *, template_args: Any = None) -> int:
        start = messages[: messages[0]["role"] == "system"]
        return len(self.render(start, False, template_args=template_args).ids)

    def remember(self, text: str) -> None:
        self.remembered.append(text)

    @contextmanager
    def held_kv(self, messages: list[dict[str, str]], *, past: bytes = b"", template_args: Any = None) -> Iterator[Any]:
        """Keys and values are the text itself; they say which model made them."""
        ids = self.render(messages, add_generation_prompt=False, template_args=template_args).ids
        count = len(ids) if self._cached else 0
        data = f"{self.info.name}\n{self.tokenizer.decode(ids[:count])}".encode()
        yield SimpleNamespace(tokens=count, nbytes=len(data), pieces=iter([data[:5], data[5:]]))

    def open_kv(self, path: Path) -> int:
        name, _, text = path.read_text().partition("\n")
        if name != self.info.name:
            raise StorageError(f"{path.name}: made with another model")
        self.opened.append(path.name)
        return len(text)

    def drop_kv(self, path: Path) -> None:
        if path.name in self.opened:
            self.opened.remove(path.name)

    def each_logits(self, ids: Any, visit: Any, *, first: int = 0) -> None:
        """Of 128 characters, every next one is likelier than the last; the one after `x` is `y` for sure."""
        import torch

        rows = torch.arange(128.0).repeat(len(ids) - first, 1)
        rows[[place - first for place in range(first, len(ids)) if ids[place] == ord("x")], ord("y")] = 1000.0
        for start in range(0, len(rows), 2):
            visit(first + start, rows[start : start + 2])

    def stream(
        self,
        prompt: Any,
        *,
        max_tokens: int | None = 256,
        sampling: SamplingParams | None = None,
        stop: Any = (),
        overflow: str = "error",
        deadline: float | None = None,
        logprobs: int = 0,
        **steer: Any,
    ) -> "FakeStream":
        options = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop, "overflow": overflow}
        options |= {name: value for name, value in steer.items() if value and value != "auto"}
        self.seen.append((prompt, options))
        turns = 0
        if isinstance(prompt, str):
            ids: tuple[int, ...] = tuple(map(ord, prompt))
        elif prompt and isinstance(prompt[0], dict):
            messages = list(prompt)
            more = {"template_args": steer.get("template_args")}
            whole = len(self.render(messages, **more).ids)
            while len(ids := self.render(messages, **more).ids) + 20 > self.info.context:
                first = 1 if messages[0]["role"] == "system" else 0
                if overflow == "error" or len(messages) <= first + 1:
                    raise PromptTooLong(f"the prompt is {len(ids)} tokens", hint="shorten it")
                del messages[first : first + 2]
                turns += 1
            if not ids:
                raise UsageError("empty")
        else:
            ids = tuple(prompt)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return FakeStream(self, ids, reply, max_tokens or 10_000, tuple(stop), turns, whole - len(ids) if turns else 0)


class FakeStream:
    def __init__(
        self,
        runtime: FakeRuntime,
        ids: tuple[int, ...],
        reply: Any,
        limit: int,
        stop: tuple[str, ...],
        turns: int,
        gone: int,
    ) -> None:
        self._runtime, self._ids, self._limit, self._stop = runtime, ids, limit, stop
        self._turns, self._gone = turns, gone
        self._reply, self._error = reply if isinstance(reply, tuple) else (reply, None)
        self._cancelled = False
        self.closed = False
        self._events = self._run()

    def __iter__(self) -> "FakeStream":
        return self

    def __next__(self) -> Any:
        return next(self._events)

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self.closed = True
        self._events.close()

    def _run(self) -> Iterator[Any]:
        reused = 0
        for a, b in zip(self._ids, self._runtime._cached, strict=False):
            if a != b:
                break
            reused += 1
        if self._turns:
            yield Dropped("r", self._gone, self._turns)
        yield Started("r", len(self._ids), reused)
        for _ in range(20):
            time.sleep(self._runtime.prefill_delay / 20)
        text, reason = "", "eos"
        if self._cancelled:
            reason = "cancelled"
        else:
            yield Prefilled("r", 0.5)
            for char in self._reply:
                if self._cancelled:
                    reason = "cancelled"
                    break
                if any((text + char).endswith(stop) for stop in self._stop):
                    reason = "stop"
                    break
                if len(text) >= self._limit:
                    reason = "length"
                    break
                text += char
                yield Text("r", char, (ord(char),), None)
                time.sleep(self._runtime.delay)
            if self._error is not None and reason == "eos":
                raise self._error
        self._runtime._cached = (*self._ids, *map(ord, text))
        yield Finished(
            "r",
            Result(
                text=text,
                ids=tuple(map(ord, text)),
                stop_reason=reason,
                prompt_tokens=len(self._ids),
                reused_tokens=reused,
                generated_tokens=len(text),
                seconds_prefill=0.5,
                seconds_decode=2.0,
                dropped_tokens=self._gone,
                dropped_turns=self._turns,
            ),
        )
