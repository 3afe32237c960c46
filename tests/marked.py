"""A runtime without a model. Marks around thoughts are special tokens: U+E000 opens, U+E001 closes, U+E002 ends."""

import types
from dataclasses import replace
from types import SimpleNamespace

from fake_runtime import FakeRuntime, FakeTokenizer

from exl_runtime.generation.stream import Finished, Text


class Marked(FakeTokenizer):
    """The marks are special tokens here, and so is the end."""

    NAMES = types.MappingProxyType({0xE000: "<think>", 0xE001: "</think>", 0xE002: "<|end|>"})
    special_ids = frozenset({0, *NAMES})

    def decode(self, ids, *, skip_special=True):
        return "".join(self.NAMES.get(i, chr(i)) for i in ids if not (skip_special and i in self.special_ids))

    def piece(self, index):
        return self.NAMES.get(index, chr(index))


class MarkedRuntime(FakeRuntime):
    """Leaves special tokens out of texts, unless it is told not to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer = Marked()
        self.template = SimpleNamespace(sources={"default": "no mark is spelled out"})

    def stream(self, prompt, *, skip_special=True, **options):
        stream = super().stream(prompt, **options)
        events, decode = stream._events, self.tokenizer.decode

        def spelled():
            for event in events:
                if isinstance(event, Text):
                    event = replace(event, text=decode(event.ids, skip_special=skip_special))
                if isinstance(event, Finished):
                    text = decode(event.result.ids, skip_special=skip_special)
                    event = replace(event, result=replace(event.result, text=text))
                yield event

        stream._events = spelled()
        return stream
