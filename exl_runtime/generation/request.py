"""What is asked for, what is given back, and the states between. Knows no tensors, no pages and no files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..cache.window import SINKS
from ..errors import UsageError
from ..sampling.params import SamplingParams
from .grammar import Grammar

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.lora import Mix

Overflow = Literal["error", "drop", "window"]
OVERFLOWS: tuple[Overflow, ...] = ("error", "drop", "window")
Speculate = Literal["auto", "ngram", "draft", "off"]
SPECULATE: tuple[Speculate, ...] = ("auto", "ngram", "draft", "off")
StopReason = Literal["eos", "stop", "length", "cancelled", "context", "deadline", "loop"]
Processor: TypeAlias = "Callable[[list[int], Tensor], Tensor]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Turns of a conversation that stand no longer in a prompt.

    past    a digest of all of them: who names the same ones finds what was computed behind them
    whole   the prompt with those that leave only now; (): none does
    before  a digest of those that had left before; b"": none had
    """

    past: bytes
    whole: tuple[int, ...] = ()
    before: bytes = b""


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
                   "window": the reply goes on when the context is full, and so does the next turn of a conversation:
                   the oldest page behind the first `keep` tokens leaves, nothing that stays is computed again (a
                   context of fewer than three pages drops a quarter and computes the rest again). A prompt that is
                   too long and of which nothing is cached is cut as with "drop"
    keep           first tokens that never leave; a window keeps whole pages of them, at most three eighths
    skip_special   leave special tokens out of the text
    dropped_*      what the caller left out already (whole turns of a conversation); reported in events and result
    left           with "drop", what is known of those turns: what stood behind them is then not computed again
    speculate      guess tokens ahead and check several in one pass; the reply is the same with and without, only the
                   speed differs. "ngram": guesses from the text so far; "draft": by the draft model (UsageError
                   without one); "auto": from whatever there is; "off": none
    grammar        the reply has to match it; it ends when nothing more may follow
    banned_strings texts that never appear in the reply, in whatever case: when one is complete, the reply is taken
                   back to the token it begins in, and another is drawn there
    prefix         the reply begins with this text, cut into tokens as the model likes
    heal           where the end of the prompt could be the beginning of a longer token, its last tokens are taken back
                   and the model has to write that text first (it is no part of the reply): a prompt may end in the
                   middle of a word
    stop_loop      (longest, times): the reply ends with reason "loop" when its last tokens, up to `longest` of them,
                   have come `times` times in a row
    processors     called with all token ids so far and the logits, float32 (vocab,), a copy; return such logits; -inf
                   removes a token. Before grammar and bans, which they cannot undo
    negative_prompt  token ids of another prompt that the reply is led away from, as far as `guidance` says: 1 not at
                   all, above 1 more (classifier-free guidance, see guidance.py); costs a second pass for every token,
                   and nothing is guessed ahead
    prompt_logprobs  report log-probabilities of the prompt's tokens, and so many of the best beside them; the prompt is
                   computed in full then, nothing of it comes from the cache
    lora           LoRA adapters of the model and their weights, added up: see `model.lora.mix_of`
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
    left: Left | None = None
    speculate: Speculate = "auto"
    grammar: Grammar | None = None
    banned_strings: tuple[str, ...] = ()
    prefix: str = ""
    heal: bool = False
    stop_loop: tuple[int, int] | None = None
    processors: tuple[Processor, ...] = ()
    prompt_logprobs: int = 0
    negative_prompt: tuple[int, ...] = ()
    guidance: float = 1.0
    lora: "Mix" = ()

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
        self._check_steering()

    def _check_steering(self) -> None:
        if self.speculate not in SPECULATE:
            raise UsageError(f"speculate is {self.speculate!r}", hint=f"use one of {', '.join(SPECULATE)}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            kind = type(self.grammar).__name__
            raise UsageError(f"grammar is a {kind}, wanted Grammar", hint="Grammar.json_schema(...) makes one, say")
        banned = self.banned_strings
        if isinstance(banned, str) or any(not isinstance(text, str) or not text for text in banned):
            raise UsageError(f"banned_strings is {banned!r}", hint="give a list of texts that are not empty")
        if not isinstance(self.prefix, str):
            raise UsageError(f"prefix is {self.prefix!r}", hint="give a text")
        if self.heal and (self.grammar is not None or self.prefix):
            raise UsageError("heal cannot be combined with grammar or prefix", hint="end the prompt at a whole word")
        if self.stop_loop is not None:
            pair = self.stop_loop if isinstance(self.stop_loop, tuple) else ()
            if len(pair) != 2 or not all(isinstance(part, int) for part in pair) or pair[0] < 1 or pair[1] < 2:
                raise UsageError(f"stop_loop is {self.stop_loop!r}", hint="give (longest, times), say (32, 4)")
        if not all(callable(processor) for processor in self.processors):
            raise UsageError("a logit processor is not callable", hint="give functions of (ids, logits)")
        if (
            isinstance(self.guidance, bool)
            or not isinstance(self.guidance, int | float)
            or not 0 <= self.guidance <= 100
        ):
            raise UsageError(f"guidance is {self.guidance!r}", hint="give a number from 0 to 100; 1 turns it off")
        if (self.guidance != 1) != bool(self.negative_prompt):
            raise UsageError("guidance and negative_prompt need each other", hint="say guidance=1.5 and a prompt")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise UsageError(f"priority is {self.priority!r:.60}", hint="give a whole number; higher goes first")
        if not isinstance(self.prompt_logprobs, int) or self.prompt_logprobs < 0:
            raise UsageError(f"prompt_logprobs is {self.prompt_logprobs!r}", hint="give a whole number from 0")


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
    drafted_tokens  guessed ahead; accepted_tokens of them came true and cost no pass of their own
    prompt_logprobs one for each token of the prompt; None for the first, before which nothing stands
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
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


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
