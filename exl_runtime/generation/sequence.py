"""The mutable side of a request: its tokens, its pages, how far it got. Decides nothing."""

from dataclasses import dataclass, field

from ..cache.pages import PageCopy
from ..sampling.sampler import Sampler
from ..tokenizer.detokenizer import Detokenizer
from .request import Request, RequestState, Result, StopReason, TokenLogprob, check_transition
from .stops import StopIds
from .stream import StopStream


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way.

    tokens     what the model sees: the prompt as it was cut, then what was generated, minus what a window dropped
    pages      the pages that hold keys and values of tokens[:kv_length], and perhaps room for more
    keys       the keys of the full ones among them, which are sealed
    kv_length  tokens whose keys and values are computed. While decoding, all but the last token
    copy       must be carried out before the first pass over this sequence
    version    changes whenever `pages` does
    """

    request: Request
    order: int
    tokens: list[int]
    root: bytes
    rope_length: int
    limit: int  # most tokens to generate
    sampler: Sampler
    detokenizer: Detokenizer
    stop_ids: StopIds
    stop_text: StopStream
    submitted: float
    prompt: tuple[int, ...] = ()
    generated: list[int] = field(default_factory=list)
    state: RequestState = RequestState.QUEUED
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    kv_length: int = 0
    copy: PageCopy | None = None
    version: int = 0
    matched: int = 0  # leading pages that came full from the cache
    follows: "tuple[Sequence, int] | None" = None  # wait until that one computed so many tokens: ours begin like them
    reused_tokens: int | None = None  # None until work on the prompt began
    started: float | None = None
    first_token: float | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reported: int = 0  # generated tokens that events have told of
    dropped_tokens: int = 0

    def __post_init__(self) -> None:
        self.prompt = tuple(self.tokens)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: higher priority, then earlier submission."""
        return -self.request.priority, self.order

    @property
    def parent(self) -> bytes:
        """The key of everything before the first page that is not full."""
        return self.keys[-1] if self.keys else self.root

    def move(self, state: RequestState) -> None:
        """Enter `state`. Raises IllegalTransition where the table does not allow it."""
        check_transition(self.id, self.state, state)
        self.state = state

    def result(self, reason: StopReason, now: float) -> Result:
        """What there is to hand out when the request ends now."""
        first = now if self.first_token is None else self.first_token
        return Result(
            text="".join(self.text),
            ids=tuple(self.generated),
            stop_reason=reason,
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused_tokens or 0,
            generated_tokens=len(self.generated),
            seconds_prefill=0.0 if self.started is None else first - self.started,
            seconds_decode=now - first,
            logprobs=tuple(self.logprobs) if self.request.sampling.logprobs else None,
            dropped_tokens=self.dropped_tokens,
            dropped_turns=self.request.dropped_turns,
        )
