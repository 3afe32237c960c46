"""What is asked for, what is given back, and the states between. Knows no tensors, no pages and no files."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from ..cache.window import SINKS
from ..errors import UsageError
from ..sampling.params import SamplingParams

Overflow = Literal["error", "drop", "window"]
OVERFLOWS: tuple[Overflow, ...] = ("error", "drop", "window")
StopReason = Literal["eos", "stop", "length", "cancelled", "context", "deadline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it. Lengths in tokens, times in seconds.

    id             names the request in events; "" lets the generator choose
    prompt         token ids, not empty
    max_tokens     most tokens to generate; None: until the context is full (with "window": one context length)
    stop           strings that end the reply; neither they nor what follows appear in the text
    stop_ids       token ids that end the reply with reason "stop", besides the model's own end-of-sequence ids
    deadline       seconds from submission after which the request ends with reason "deadline"
    priority       higher runs first and keeps its pages longest; equal priorities in order of submission
    overflow       "error": a prompt that does not fit raises PromptTooLong, a full context ends the reply;
                   "drop": the oldest prompt tokens after the first `keep` leave so that prompt and reply fit;
                   "window": the same, and again whenever the context is full: the reply goes on
    keep           first tokens that never leave
    skip_special   leave special tokens out of the text
    dropped_*      what the caller left out already (whole turns of a conversation); reported in events and result
    """

    prompt: tuple[int, ...]
    id: str = ""
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)  # `logprobs` in it asks for log-probabilities
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    deadline: float | None = None
    priority: int = 0
    overflow: Overflow = "error"
    keep: int = SINKS
    skip_special: bool = True
    dropped_tokens: int = 0
    dropped_turns: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("the prompt is empty", hint="give at least one token (a BOS token counts)")
        whole = isinstance(self.max_tokens, int) and not isinstance(self.max_tokens, bool)
        if self.max_tokens is not None and (not whole or self.max_tokens < 1):
            raise UsageError(f"max_tokens is {self.max_tokens!r}", hint="give a number from 1, or None for no limit")
        if not isinstance(self.sampling, SamplingParams):
            kind = type(self.sampling).__name__
            raise UsageError(f"sampling is a {kind}, wanted SamplingParams", hint="SamplingParams.from_dict takes one")
        if isinstance(self.stop, str) or any(not isinstance(stop, str) or not stop for stop in self.stop):
            raise UsageError(f"stop is {self.stop!r}", hint="give texts that are not empty")
        timed = isinstance(self.deadline, int | float) and not isinstance(self.deadline, bool)
        if self.deadline is not None and not (timed and self.deadline > 0):
            raise UsageError(f"deadline is {self.deadline!r}", hint="give seconds above 0, or None for no deadline")
        if self.overflow not in OVERFLOWS:
            raise UsageError(f"unknown overflow policy {self.overflow!r}", hint=f"use one of {', '.join(OVERFLOWS)}")
        if self.keep < 0:
            raise UsageError(f"keep is {self.keep}", hint="give the number of first tokens that stay, 0 or more")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of the probability a token was drawn with, and the most likely (id, logprob) beside it."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished request.

    text     what the ids say, up to a stop string and without an end-of-sequence token
    ids      every generated token, also one that ended the reply; generated_tokens is their number
    prompt_tokens   tokens of the prompt as it was run; reused_tokens of them came from the cache
    seconds_prefill from the first work on the prompt to the first token; seconds_decode from there to the end
    dropped_*       what left because of the context length
    """

    text: str
    ids: tuple[int, ...]
    stop_reason: StopReason
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    seconds_prefill: float
    seconds_decode: float
    logprobs: tuple[TokenLogprob, ...] | None = None
    dropped_tokens: int = 0
    dropped_turns: int = 0


class RequestState(Enum):
    """Where a request is. QUEUED holds no pages; PREFILL and DECODE do; the last two are final."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    FAILED = "failed"


_ENDS = frozenset({RequestState.FINISHED, RequestState.FAILED})
TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: _ENDS | {RequestState.PREFILL},
    RequestState.PREFILL: _ENDS | {RequestState.DECODE, RequestState.QUEUED},  # queued again: it yielded its pages
    RequestState.DECODE: _ENDS | {RequestState.QUEUED},  # the same, or its window moved
    RequestState.FINISHED: frozenset(),
    RequestState.FAILED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A bug in this runtime: a request was moved to a state that cannot follow its present one."""


def check_transition(request_id: str, present: RequestState, following: RequestState) -> None:
    """Raise IllegalTransition unless TRANSITIONS allows it."""
    if following not in TRANSITIONS[present]:
        raise IllegalTransition(f"request {request_id}: {present.name} cannot become {following.name}")
