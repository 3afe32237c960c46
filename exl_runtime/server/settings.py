"""What the server is told at its start. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..sampling.params import SamplingParams

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one model is served. Sizes in bytes, times in seconds.

    name      what the model is called; `aliases`: other names that mean it, "*" is any name
    sampling  what a request leaves out
    max_tokens  of chat replies that name no limit; None: until the context is full
    template_args  variables of the chat template; those of a request win
    overflow  what a full context does unless the request says: "error", "drop" or "window"
    api_key   what clients have to know; None: nothing
    origins   web pages that may use the server ("*": all); without, no page may
    hosts     names by which clients may address the server; None: any
    parallel  replies that are generated at once; `queue`: how many more may wait
    """

    name: str
    aliases: frozenset[str] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    overflow: str = "error"
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: frozenset[str] | None = LOOPBACK
    parallel: int = 16
    queue: int = 64
    max_body: int = 8 * 2**20
    keep_alive: float = 10.0
