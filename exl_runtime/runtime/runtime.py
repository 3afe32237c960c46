"""`Runtime`: an opened model with everything around it. What hobby programs embed."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Self, Unpack

from ..cache.storage import KVStorage
from ..cache.window import SINKS
from ..errors import UsageError
from ..generation.generator import Generator
from ..generation.request import OVERFLOWS, Request, Result, Speculate
from ..generation.scheduler import PREFILL_TOKENS
from ..generation.stream import Event
from ..model.graph_cuda import recorder_for
from ..model.split_model import SplitCache, SplitTransformer, devices_of, free_devices
from ..model.transformer import Transformer
from ..sampling.params import SamplingParams
from ..tokenizer.template import ChatTemplate
from ..tokenizer.tokenizer import Tokenizer
from .info import RuntimeInfo, RuntimeStats
from .kv import HeldKV, KVKeeper
from .lora import Given, LoraInfo, Loras
from .prepare import Message, Preparer, Prompt, Rendered, is_batch
from .samples import expanded
from .steer import Steer, checked
from .stream import CountingStream, Stream

if TYPE_CHECKING:
    from ..chat.session import ChatSession

MAX_TOKENS = 256  # of a reply when the caller names no limit
_END = object()


class Runtime:
    """Made by `load`. Thread-safe: several threads may generate at once, their requests share every step.

    Prompts are text, token ids, or messages ({"role": ..., "content": ...}); a list of prompts is a batch.
    Use as a context manager, or call `close` to free the memory.
    """

    def __init__(
        self,
        *,
        model: Transformer | SplitTransformer,
        kv: KVStorage | SplitCache,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        info: RuntimeInfo,
        draft: tuple[Transformer, KVStorage] | None = None,
        speculate: Speculate = "auto",
        step_tokens: int = PREFILL_TOKENS,
        host_cache: int = 0,
    ) -> None:
        """`host_cache`: bytes of host memory for what reused pages held."""
        self.info = info
        self._speculate = speculate
        self.tokenizer = tokenizer
        self.template = template
        self._generator: Generator | None = Generator(
            model,
            kv,
            tokenizer,
            context=info.context,
            prefill_tokens=step_tokens,
            draft=draft,
            recorder=recorder_for(model),
            host_bytes=host_cache,
        )
        self._loras = Loras(model)
        self._kv = KVKeeper(Path(info.path), f"{info.backend} {getattr(model, 'dtype', '')} {info.accuracy}")
        self._preparer = Preparer(
            tokenizer=tokenizer,
            template=template,
            vocab_size=model.spec.vocab_size,
            context=info.context,
            knows=lambda past: self._engine().knows_past(past),
        )
        self._ids = itertools.count(1)
        self._seconds = [0.0, 0.0]  # spent on prompts and on replies by finished requests
        self._tokens = [0, 0]

    # --- generation -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: "Prompt | Sequence[Prompt]",
        *,
        max_tokens: int | None = MAX_TOKENS,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: str | Sequence[str] | None = (),
        overflow: str = "error",
        deadline: float | None = None,
        logprobs: int = 0,
        n: int | None = None,
        **steer: Unpack[Steer],
    ) -> Any:
        """Run to the end: a Result for one prompt, a list of Results for a list of prompts.

        max_tokens  of the reply; None: until the context is full
        sampling    how tokens are chosen; for a list of prompts also a list, one for each (a seed for each, say)
        stop        strings that end the reply; not part of the text
        overflow    what to do when the context is too small: "error" (PromptTooLong, or stop_reason "context"),
                    "drop" (oldest turns or tokens leave before the start), "window" (and again whenever it is full)
        deadline    seconds, queueing included; then the reply ends with stop_reason "deadline"
        logprobs    report the log-probability of every token and of the n best alternatives
        n           so many replies to each prompt, which is computed once: in place of each Result a list of n Results,
                    the i-th as if asked for alone with seed + i
        Further, as described at `Request`: speculate ("auto" | "ngram" | "draft" | "off"), grammar (a Grammar),
        banned_strings, prefix, heal, stop_ids, stop_loop, processors (functions of ids and logits), prompt_logprobs,
        negative_prompt (as `prompt`) with guidance (a number above 1), lora (names and weights, see `load_lora`),
        priority (higher goes first), keep and left (for token ids; what they say of messages is found out),
        template_args (variables of the chat template, for messages: {"enable_thinking": False}).
        An empty list is an empty prompt, which is an error, not an empty batch.
        Raises ExlError subclasses for what the caller can fix; nothing of the batch is kept then.
        """
        many = is_batch(prompt)
        prompts: Sequence[Any] = prompt if many else [prompt]
        if many and isinstance(sampling, Sequence):
            if len(sampling) != len(prompts):
                raise UsageError(f"{len(sampling)} sampling parameters for {len(prompts)} prompts")
            chosen = list(sampling)
        else:
            chosen = [sampling] * len(prompts)
        requests = [
            self._request(one, max_tokens, params, stop, overflow, deadline, logprobs, steer)
            for one, params in zip(prompts, chosen, strict=True)
        ]
        results: list[Any] = self._engine().run(requests if n is None else expanded(requests, n))
        for result in results:
            self._count(result)
        if n is not None:
            results = [results[start : start + n] for start in range(0, len(results), n)]
        return results if many else results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = MAX_TOKENS,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        overflow: str = "error",
        deadline: float | None = None,
        logprobs: int = 0,
        skip_special: bool = True,
        **steer: Unpack[Steer],
    ) -> Stream:
        """The events of one request as they happen: Started, Prefilled, Text..., Finished. Parameters as `generate`.

        skip_special  False: special tokens appear in the text as the vocabulary writes them
        """
        if is_batch(prompt):
            raise UsageError("stream takes one prompt", hint="use generate for a batch, or one stream per thread")
        request = self._request(prompt, max_tokens, sampling, stop, overflow, deadline, logprobs, steer)
        request = replace(request, skip_special=skip_special)
        return CountingStream(self._engine(), request, self._count)

    async def astream(self, prompt: Prompt, **options: Any) -> AsyncIterator[Event]:
        """`stream` for asyncio: the steps run in a worker thread. Leaving the loop early cancels the request."""
        stream = self.stream(prompt, **options)
        try:
            while (event := await asyncio.to_thread(next, stream, _END)) is not _END:
                yield event
        finally:
            stream.cancel()
            await asyncio.to_thread(stream.close)

    def logits(self, ids: Sequence[int], *, lora: Given = None) -> Tensor:
        """float32 (tokens, vocab) on the CPU: after every token, the scores of the next one. Reads no cached prefix.

        Raises PromptTooLong when `ids` do not fit the context, UsageError for ids the model does not have.
        """
        return self._engine().logits(self._checked(ids), mix=self._loras.mix(lora))

    def each_logits(
        self, ids: Sequence[int], visit: Callable[[int, Tensor], None], *, first: int = 0, lora: Given = None
    ) -> None:
        """What `logits` gives, in parts and in order: `visit(position, rows)`.

        rows    float32 (n, vocab) on the CPU, after the tokens position ... position + n - 1; valid during the call
        first   position of the first row wanted; those before it cost no pass through the head
        `visit` must not call this runtime. Raises as `logits`, and whatever `visit` raises.
        """
        self._engine().each_logits(self._checked(ids), visit, first=first, mix=self._loras.mix(lora))

    def remember(self, text: str | Sequence[int]) -> None:
        """Let guesses ahead come from this text too: a document to be quoted, a saved conversation. Costs no pass."""
        self._engine().remember(self.tokenizer.encode(text) if isinstance(text, str) else self._checked(text))

    # --- adapters ---------------------------------------------------------------------------------------------

    def load_lora(self, path: str | Path, name: str | None = None) -> str:
        """Load a LoRA adapter (a folder as peft writes it) beside the model, and return its name: that of the folder
        unless given. It changes nothing until a request asks for it (`lora={"name": weight}`) or `set_lora` does.

        Raises AdapterError, ConfigError or CheckpointError for an adapter that is damaged, of another model, or of a
        kind that is not supported (DoRA, embeddings, experts ...), UsageError for a name in use.
        """
        self._engine()
        return self._loras.load(path, name)

    def unload_lora(self, name: str) -> None:
        """Free an adapter. Requests that run with it go on."""
        self._loras.unload(name)

    def set_lora(self, lora: Given) -> None:
        """The adapters of requests that do not say: {"name": weight, ...}, a name, several names; None: none."""
        self._loras.set(lora)

    @property
    def loras(self) -> tuple[LoraInfo, ...]:
        """The adapters that are loaded."""
        return self._loras.infos

    # --- keys and values as files -----------------------------------------------------------------------------

    @contextmanager
    def held_kv(
        self, messages: Sequence[Message], *, past: bytes = b"", template_args: Mapping[str, Any] | None = None
    ) -> Iterator[HeldKV]:
        """What the cache holds of a conversation, for a snapshot: its size, and the bytes to write within the block.
        past: of turns that left before these messages, see `Left`."""
        ids = self._preparer.render(messages, add_generation_prompt=False, template_args=template_args).ids
        keep = max(SINKS, self._preparer.head(messages, ids, template_args=template_args))
        with self._kv.holding(self._engine(), ids, past=past, keep=keep) as held:
            yield held

    def open_kv(self, path: str | PathLike[str]) -> int:
        """Let prompts begin with what the snapshot in `path` holds; returns its tokens. It is read when needed.

        Raises StorageError in one line: damaged, cut short, of another model or another cache type.
        """
        return self._kv.open(self._engine(), Path(path))

    def drop_kv(self, path: str | PathLike[str]) -> None:
        """Read no more from the snapshot in `path`, if it is open. The file stays."""
        self._kv.drop(self._engine(), Path(path))

    # --- conversations ----------------------------------------------------------------------------------------

    def chat(self, system: str | None = None) -> "ChatSession":
        """A conversation that remembers its turns; every turn reuses the cache of the ones before."""
        from ..chat.session import ChatSession

        return ChatSession(self, system=system)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The exact text and ids the model would see. Raises TemplateError.

        tools  JSON schemas of functions; template_args  further variables of the template, such as enable_thinking
        """
        return self._preparer.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_args=template_args
        )

    def head(
        self,
        messages: Sequence[Message],
        ids: Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> int:
        """How many of these tokens of a rendered conversation stand before its first turn: the `keep` of a window."""
        return self._preparer.head(messages, ids, tools=tools, template_args=template_args)

    # --- the rest ---------------------------------------------------------------------------------------------

    @property
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters."""
        now = self._engine().stats
        prefill, decode = (
            tokens / seconds if seconds else 0.0 for tokens, seconds in zip(self._tokens, self._seconds, strict=True)
        )
        return RuntimeStats(
            requests=now.requests,
            prompt_tokens=now.prompt_tokens,
            reused_tokens=now.reused_tokens,
            generated_tokens=now.generated_tokens,
            waiting=now.waiting,
            running=now.running,
            pages_total=now.pages_total,
            pages_held=now.pages_held,
            pages_idle=now.pages_idle,
            weight_bytes=self.info.weight_bytes,
            cache_bytes=self.info.cache_bytes,
            prefill_tokens_per_second=prefill,
            decode_tokens_per_second=decode,
            drafted_tokens=now.drafted_tokens,
            accepted_tokens=now.accepted_tokens,
            reused_from_host=now.host_tokens,
            reused_from_disk=now.disk_tokens,
            evictions=now.evictions,
            host_cache_bytes=now.host_bytes,
        )

    def close(self) -> None:
        """Free the weights and the cache. Any further call raises UsageError."""
        generator, self._generator = self._generator, None
        self._loras.clear()
        if generator is not None:
            self._kv.close()
            devices = devices_of(generator.model)
            del generator
            free_devices(devices)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self) -> Generator:
        if self._generator is None:
            raise UsageError("this runtime is closed", hint="load the model again")
        return self._generator

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        return self._preparer.prepare(list(ids), max_tokens=None, overflow="error").ids

    def _request(
        self,
        prompt: Prompt,
        max_tokens: int | None,
        sampling: SamplingParams | None,
        stop: str | Sequence[str],
        overflow: str,
        deadline: float | None,
        logprobs: int,
        steer: Mapping[str, Any],
    ) -> Request:
        if overflow not in OVERFLOWS:
            raise UsageError(f"unknown overflow policy {overflow!r}", hint=f"use one of {', '.join(OVERFLOWS)}")
        params = sampling if sampling is not None else SamplingParams()
        if logprobs and isinstance(params, SamplingParams):
            params = replace(params, logprobs=logprobs)
        fields = self._steered(steer)
        keep, left, args = fields.pop("keep", 0), fields.pop("left", None), fields.pop("template_args", None)
        past = b"" if left is None else left.past
        prepared = self._preparer.prepare(
            prompt, max_tokens=max_tokens, overflow=overflow, past=past, template_args=args
        )
        return Request(
            id=f"request-{next(self._ids)}",
            prompt=prepared.ids,
            max_tokens=max_tokens,
            sampling=params,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            deadline=deadline,
            overflow=overflow,
            keep=max(SINKS, prepared.head, keep),
            left=prepared.left or left,
            dropped_turns=prepared.dropped_turns,
            dropped_tokens=prepared.dropped_tokens,
            **{"speculate": self._speculate, **fields},
        )

    def _steered(self, steer: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a Request."""
        fields = checked(steer)
        fields["lora"] = self._loras.mix(fields.get("lora"))
        if "negative_prompt" in fields:
            negative = fields["negative_prompt"]
            fields["negative_prompt"] = self._preparer.beside(negative, fields.get("template_args")) if negative else ()
        return fields

    def _count(self, result: Result) -> None:
        self._tokens[0] += result.prompt_tokens - result.reused_tokens
        self._tokens[1] += max(0, result.generated_tokens - 1)  # the first token comes with the prompt
        self._seconds[0] += result.seconds_prefill
        self._seconds[1] += result.seconds_decode
