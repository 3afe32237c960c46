"""From a request to a sequence: what does not fit is refused or cut here, before anything runs."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from secrets import randbits
from typing import TYPE_CHECKING

from ..cache import window
from ..cache.prefix import root_key
from ..config.spec import ModelSpec
from ..errors import PromptTooLong, UsageError
from ..sampling.sampler import Sampler
from .request import Request
from .sequence import Sequence
from .stops import StopIds
from .stream import StopStream

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

MakeSampler = Callable[[Request, int], Sampler]  # request, seed


class Intake:
    """Knows the limits every request of one generator has to keep."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: "Tokenizer",
        *,
        context: int,
        page_size: int,
        make_sampler: MakeSampler | None,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.context = context
        self.step = window.slack(context, page_size)
        self._make_sampler = make_sampler or self._default_sampler
        # Fine-tunes often teach a new end of turn and tell only the tokenizer, not the configuration.
        eos = tokenizer.eos_id
        known = eos is not None and 0 <= eos < spec.vocab_size
        self.eos_ids = frozenset((*spec.eos_ids, eos) if known else spec.eos_ids)

    def prepare(self, request: Request, *, order: int, now: float) -> Sequence:
        """A QUEUED sequence. Raises PromptTooLong, or UsageError for unknown token ids or bad sampling settings."""
        self.check_ids(request.prompt)
        tokens, dropped = self._fit(request)
        limit = self.context if request.max_tokens is None else request.max_tokens
        planned = self.context if request.overflow == "window" else min(len(tokens) + limit, self.context)
        rope_length = self.spec.rope_length(planned)
        seed = randbits(63) if request.sampling.seed is None else request.sampling.seed
        return Sequence(
            request=request,
            order=order,
            tokens=tokens,
            root=root_key(rope_length),
            rope_length=rope_length,
            limit=limit,
            sampler=self._make_sampler(request, seed),
            detokenizer=self.tokenizer.detokenizer(skip_special=request.skip_special),
            stop_ids=StopIds(self.eos_ids, request.stop_ids | self._spelled(request.stop)),
            stop_text=StopStream(request.stop),
            submitted=now,
            dropped_tokens=dropped + request.dropped_tokens,
        )

    def _spelled(self, stops: tuple[str, ...]) -> set[int]:
        """Control tokens that stop strings spell out: they are no part of the text in which strings are looked for."""
        ids = {self.tokenizer.id_of(stop) for stop in stops}
        return {token for token in ids if token is not None and token in self.tokenizer.special_ids}

    def cut(self, length: int, keep: int) -> window.Cut:
        """What leaves a full context so that the reply can go on."""
        return window.cut(length, limit=self.context - 1, keep=keep, step=self.step)

    def _fit(self, request: Request) -> tuple[list[int], int]:
        """The prompt as it will run, and how many tokens had to leave."""
        tokens = list(request.prompt)
        if request.overflow == "error":
            if len(tokens) >= self.context:
                raise PromptTooLong(
                    f"the prompt is {len(tokens)} tokens, the context holds {self.context} with at least one of reply",
                    hint="shorten it, raise --context, or let old tokens go: --overflow drop or window",
                )
            return tokens, 0
        limit = window.prompt_limit(self.context, request.max_tokens)
        gone = window.cut(len(tokens), limit=limit, keep=request.keep, step=self.step)
        del tokens[gone.start : gone.stop]
        return tokens, gone.tokens

    def check_ids(self, prompt: Many[int]) -> None:
        """Raise UsageError for an id the model does not know; `prompt` is not empty."""
        size = self.spec.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < size:
            wrong = next(token for token in prompt if not 0 <= token < size)
            raise UsageError(
                f"the prompt has token id {wrong}, the model knows 0 to {size - 1}",
                hint="the tokenizer and the model may not belong together",
            )

    def _default_sampler(self, request: Request, seed: int) -> Sampler:
        params = request.sampling
        breakers = frozenset[int]()
        if params.dry_multiplier:
            breakers = self.tokenizer.ids_containing(params.dry_sequence_breakers)
        return Sampler(
            params, vocab_size=self.spec.vocab_size, seed=seed, dry_breaker_ids=breakers, eos_ids=self.eos_ids
        )
