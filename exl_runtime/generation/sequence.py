"""The mutable side of a request: its tokens, its pages, how far it got. Decides nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..cache.pages import PageCopy
from ..cache.pools import Held
from ..cache.sinks import Sinks
from ..cache.window import NOTHING, Cut, Roll
from ..sampling.sampler import Sampler
from ..tokenizer.detokenizer import Detokenizer
from .banning import Bans
from .guidance import Shadow
from .lookup import SuffixIndex
from .pace import Pace
from .request import Left, Request, RequestState, Result, StopReason, TokenLogprob, check_transition
from .steering import Steering
from .stops import StopIds
from .stream import StopStream, Trim


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way.

    tokens     what the model sees: the prompt as it was cut, then what was generated, minus what a window dropped
    held       in every pool, the pages with keys and values of tokens[:kv_length], and perhaps room for more
    keys       the keys of the full ones among them, which are sealed
    kv_length  tokens whose keys and values are computed. While decoding, all but the last token
    copies     must be carried out before the first pass over this sequence
    version    changes whenever `held` does
    roll       how it goes on past a full context; None: as its overflow policy says
    shift      rope position of every token, less its index in `tokens`: as many have left from behind the first ones
    gone       those tokens; `left` is the most there ever were of them, `told` how many of those events told of
    whole      the prompt before it was cut, of which `cut` left: more of it may be in the cache
    left_turns what left a conversation before; `root` is then not always `base`, where keys begin if nothing left
    placed     (start, stop): these tokens are in the cache although some before them are still to be computed
    draft      guesses behind `tokens`, of which `room` have slots and `wish` were asked for; from the source of `pace`
    draft_length  tokens whose keys and values the draft model has computed
    settled    generated tokens that no banned string can take back
    prompt_scores  log-probabilities of the prompt's tokens from the second on, as far as they are known
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
    held: list[Held] = field(default_factory=lambda: [Held()])
    keys: list[bytes] = field(default_factory=list)
    kv_length: int = 0
    copies: tuple[PageCopy, ...] = ()
    version: int = 0
    matched: int = 0  # leading pages that came full from the cache
    follows: "tuple[Sequence, int] | None" = None  # wait until that one computed so many tokens: ours begin like them
    reused_tokens: int | None = None  # None until work on the prompt began
    started: float | None = None
    first_token: float | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reported: int = 0  # generated tokens that events have told of
    dropped_tokens: int = 0  # before the first of `gone`
    roll: Roll | None = None
    shift: int = 0
    gone: list[int] = field(default_factory=list)
    left: int = 0
    told: int = 0
    sinks: Sinks | None = None
    whole: tuple[int, ...] | None = None
    cut: Cut = NOTHING
    left_turns: Left | None = None
    base: bytes = b""
    placed: tuple[int, int] | None = None
    planned: int = 0  # tokens, prompt and reply
    # guesses
    draft: list[int] = field(default_factory=list)
    wish: int = 0
    room: int = 0
    pace: Pace | None = None
    lookup_pace: Pace = field(default_factory=Pace)
    model_pace: Pace = field(default_factory=Pace)
    index: SuffixIndex | None = None
    draft_length: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    # constraints
    steering: Steering | None = None
    shadow: Shadow | None = None
    bans: Bans | None = None
    trim: Trim | None = None
    settled: int = 0
    rewinds: int = 0
    sampler_states: list[Any] = field(default_factory=list)  # before each token, where it may be taken back
    new_detokenizer: Callable[[], Detokenizer] | None = None
    prompt_scores: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt, self.base = tuple(self.tokens), self.root

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def pages(self) -> list[int]:
        """The pages of the first pool."""
        return self.held[0].pages

    @pages.setter
    def pages(self, pages: list[int]) -> None:
        self.held[0].pages = pages

    @property
    def tables(self) -> list[list[int]]:
        """The pages of every pool; 0 where one has left."""
        return [held.pages for held in self.held]

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: higher priority, then earlier submission."""
        return -self.request.priority, self.order

    @property
    def scores_prompt(self) -> bool:
        """True while log-probabilities of the prompt are wanted."""
        return self.request.prompt_logprobs > 0 and len(self.prompt_scores) < len(self.prompt) - 1

    @property
    def reusable(self) -> int:
        """Most tokens that may come from the cache: logits that are wanted have to be computed."""
        return len(self.prompt_scores) if self.scores_prompt else len(self.tokens)

    @property
    def parent(self) -> bytes:
        """The key of everything before the first page that is not full."""
        key = self.keys[-1] if self.keys else self.root
        return self.roll.mark(key) if self.roll is not None and self.shift else key

    @property
    def capacity(self) -> int:
        """Most tokens that may be in the cache before some have to leave, or before others are there already."""
        if self.placed is not None:
            return self.placed[0]
        return len(self.tokens) if self.roll is None else self.roll.capacity

    def reach(self, length: int) -> None:
        """That many tokens are in the cache, and those that were put behind them."""
        if self.placed is not None and length == self.placed[0]:
            if self.draft_length == length:
                self.draft_length = self.placed[1]
            length, self.placed = self.placed[1], None
        self.kv_length = length

    def is_late(self, now: float) -> bool:
        """True from the deadline of the request on."""
        return self.request.deadline is not None and now - self.submitted >= self.request.deadline

    def move(self, state: RequestState) -> None:
        """Enter `state`. Raises IllegalTransition where the table does not allow it."""
        check_transition(self.id, self.state, state)
        self.state = state

    def set_gone(self, count: int) -> None:
        """Of all tokens, the first `count` behind the sinks have left; 0 brings all back."""
        assert self.roll is not None
        kept, more = self.roll.kept, count - len(self.gone)
        if more >= 0:
            self.gone += self.tokens[kept : kept + more]
            del self.tokens[kept : kept + more]
        else:
            self.tokens[kept:kept] = self.gone[count:]
            del self.gone[count:]
        self.shift, self.left, self.index = count, max(self.left, count), None

    def tell(self, pieces: list[str]) -> str:
        """The text that became certain with these pieces, one of each of the next settled tokens. After a stop string
        what follows is no part of the reply."""
        text = ""
        for piece in pieces:
            self.settled += 1
            text += self.stop_text.push(piece if self.trim is None else self.trim.push(piece))
            if self.stop_text.stopped:
                del self.generated[self.settled :], self.logprobs[self.settled :]
                break
        return text

    def close(self) -> str:
        """The last text: no token follows."""
        text = "" if self.bans is None else self.tell(self.bans.flush())
        rest = self.detokenizer.finish()
        text += self.stop_text.push(rest if self.trim is None else self.trim.push(rest)) + self.stop_text.finish()
        self.settled = len(self.generated)
        return text

    def take_back(self, index: int) -> None:
        """Forget the tokens from `index` of the reply on; the first of them shall not come there again."""
        count = len(self.generated) - index
        assert self.bans is not None and self.steering is not None and self.new_detokenizer is not None
        self.steering.back(index, count, self.generated[index])
        self.sampler.restore(self.sampler_states[index])
        del self.sampler_states[index:], self.generated[index:], self.logprobs[index:]
        del self.tokens[len(self.tokens) - count :], self.bans.pending[index - self.settled :]
        self.index = None
        self.detokenizer = self.new_detokenizer()
        for token in self.generated:  # how much of a character is open depends on all of them
            self.detokenizer.push(token)

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
            dropped_tokens=self.dropped_tokens + self.left,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            prompt_logprobs=(None, *self.prompt_scores) if self.request.prompt_logprobs else None,
            dropped_turns=self.request.dropped_turns,
        )
