"""exl-runtime: EXL2 and GPTQ models in your terminal and in your programs, on a GPU or on a plain CPU.

The public names, loaded on first use so that `import exl_runtime` costs nothing and needs no torch:

    load, Runtime, RuntimeInfo, RuntimeStats      a model, opened
    SamplingParams, Grammar                       how tokens are chosen, and what a reply has to look like
    Result, TokenLogprob                          what a finished request gives
    Started, Prefilled, Text, Dropped, Finished   what a running request reports
    ChatSession                                   a conversation that can be edited, saved and resumed
    errors                                        the exceptions, all below `errors.ExlError`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load": "runtime",
    "Runtime": "runtime",
    "RuntimeInfo": "runtime",
    "RuntimeStats": "runtime",
    "Rendered": "runtime",
    "SamplingParams": "sampling.params",
    "Grammar": "generation.grammar",
    "Result": "generation.request",
    "TokenLogprob": "generation.request",
    "Started": "generation.stream",
    "Prefilled": "generation.stream",
    "Text": "generation.stream",
    "Dropped": "generation.stream",
    "Finished": "generation.stream",
    "ChatSession": "chat.session",
}
__all__ = [*_HOMES, "__version__", "errors"]

if TYPE_CHECKING:
    from . import errors
    from .chat.session import ChatSession
    from .generation.grammar import Grammar
    from .generation.request import Result, TokenLogprob
    from .generation.stream import Dropped, Finished, Prefilled, Started, Text
    from .runtime import Rendered, Runtime, RuntimeInfo, RuntimeStats, load
    from .sampling.params import SamplingParams


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
