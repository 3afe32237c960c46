"""From a request to a sequence: what does not fit is refused or cut here, before anything runs."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from secrets import randbits
from typing import TYPE_CHECKING

from ..cache import window
from ..cache.prefix import root_key
from ..config.spec import ModelSpec
from ..errors import PromptTooLong, UsageError
from ..model.lora import mix_key
from ..sampling.sampler import Sampler
from .banning import Bans
from .guidance import Shadow
from .matching import GrammarCompiler
from .request import Left, Request
from .sequence import Sequence
from .steering import Opening, Steering
from .stops import StopIds
from .stream import StopStream, Trim
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from ..tokenizer.detokenizer import Detokenizer
    from ..tokenizer.tokenizer import Tokenizer

HEALED = 4  # most tokens that are taken back to heal a prompt
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
        drafts: bool = False,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.context = context
        self._drafts = drafts
        self.step = window.slack(context, page_size)
        self._page_size = page_size
        self._make_sampler = make_sampler or self._default_sampler
        # Fine-tunes often teach a new end of turn and tell only the tokenizer, not the configuration.
        eos = tokenizer.eos_id
        known = eos is not None and 0 <= eos < spec.vocab_size
        self.eos_ids = frozenset((*spec.eos_ids, eos) if known else spec.eos_ids)
        self._grammars = GrammarCompiler(tokenizer, spec.vocab_size, self.eos_ids)
        self._vocabulary: Vocabulary | None = None

    def prepare(self, request: Request, *, order: int, now: float) -> Sequence:
        """A QUEUED sequence. Raises PromptTooLong, or UsageError for unknown token ids or bad sampling settings."""
        self.check_ids(request.prompt)
        if request.speculate == "draft" and not self._drafts:
            raise UsageError(
                "there is no draft model to speculate with", hint='open one with the model: load(..., draft="FOLDER")'
            )
        roll = self._roll(request)
        tokens, gone = self._fit(request, roll)
        length = len(tokens)
        healed = self._heal(tokens) if request.heal else b""
        whole = request.prompt[: len(request.prompt) - (length - len(tokens))]
        limit = self.context if request.max_tokens is None else request.max_tokens
        planned = self.context if request.overflow == "window" else min(len(tokens) + limit, self.context)
        rope_length = self.spec.rope_length(planned)
        seed = randbits(63) if request.sampling.seed is None else request.sampling.seed
        return Sequence(
            request=request,
            order=order,
            tokens=tokens,
            root=mix_key(root_key(rope_length), request.lora),
            rope_length=rope_length,
            limit=limit,
            sampler=self._make_sampler(request, seed),
            detokenizer=self._detokenizer(request),
            stop_ids=StopIds(self.eos_ids, request.stop_ids | self._spelled(request.stop)),
            stop_text=StopStream(request.stop),
            submitted=now,
            dropped_tokens=gone.tokens + request.dropped_tokens,
            roll=roll,
            whole=whole if roll is not None and gone.tokens else None,
            left_turns=self._left(request, healed=length - len(tokens), cut=gone.tokens),
            cut=gone,
            planned=planned,
            steering=self._steering(request, healed or request.prefix.encode("utf-8")),
            bans=Bans(request.banned_strings) if request.banned_strings else None,
            trim=Trim(healed.decode("utf-8")) if healed else None,
            shadow=self._shadow(request),
            new_detokenizer=lambda: self._detokenizer(request),
        )

    def _left(self, request: Request, *, healed: int, cut: int) -> Left | None:
        """What may be found of turns that left; `healed` tokens were taken off the end, `cut` from within."""
        left = request.left
        if left is None or request.overflow != "drop" or cut or request.prompt_logprobs:
            return None
        return replace(left, whole=left.whole[: len(left.whole) - healed])

    def _detokenizer(self, request: Request) -> "Detokenizer":
        return self.tokenizer.detokenizer(skip_special=request.skip_special)

    def _shadow(self, request: Request) -> Shadow | None:
        """Raises UsageError for unknown ids, PromptTooLong when the reply may not fit behind the negative prompt."""
        if not request.negative_prompt:
            return None
        self.check_ids(request.negative_prompt)
        most = len(request.negative_prompt) + (request.max_tokens or self.context)
        if most > self.context:
            raise PromptTooLong(
                f"the negative prompt and the reply may be {most} tokens, the context holds {self.context}",
                hint="shorten it, or lower max_tokens",
            )
        rope_length = self.spec.rope_length(most)
        return Shadow(request.negative_prompt, scale=request.guidance, most=most, rope_length=rope_length)

    def _steering(self, request: Request, opening: bytes) -> Steering | None:
        """None when nothing is asked for that edits logits. Raises UsageError for what cannot be used."""
        if not (request.grammar or request.processors or request.banned_strings or opening):
            return None
        return Steering(
            matcher=None if request.grammar is None else self._grammars.matcher(request.grammar),
            opening=Opening(opening, self._words()) if opening else None,
            processors=request.processors,
        )

    def _heal(self, tokens: list[int]) -> bytes:
        """Take tokens off the end of a prompt so that a longer one can come in their place; what they spell. b"" where
        there is nothing to heal: no token begins with what the last ones spell."""
        words, ending, healed = self._words(), b"", b""
        for back, token in enumerate(reversed(tokens[1:][-HEALED:]), 1):
            spelled = words.spelled(token)
            if not spelled:  # a special token
                break
            ending = spelled + ending
            if words.extends(ending) and _is_text(ending):
                healed, count = ending, back
        if healed:
            del tokens[-count:]
        return healed

    def _words(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer, self.spec.vocab_size)
        return self._vocabulary

    def _spelled(self, stops: tuple[str, ...]) -> set[int]:
        """Control tokens that stop strings spell out: they are no part of the text in which strings are looked for."""
        ids = {self.tokenizer.id_of(stop) for stop in stops}
        return {token for token in ids if token is not None and token in self.tokenizer.special_ids}

    def cut(self, length: int, keep: int) -> window.Cut:
        """What leaves a full context so that the reply can go on."""
        return window.cut(length, limit=self.context - 1, keep=keep, step=self.step)

    def _roll(self, request: Request) -> window.Roll | None:
        # Places in the prompt are counted from its beginning where each of its tokens is scored.
        if request.overflow != "window" or request.prompt_logprobs:
            return None
        return window.roll_for(self.context, request.keep, self._page_size)

    def _fit(self, request: Request, roll: window.Roll | None) -> tuple[list[int], window.Cut]:
        """The prompt as it will run when nothing is cached, and what has to leave for that."""
        tokens = list(request.prompt)
        if request.overflow == "error":
            if len(tokens) >= self.context:
                raise PromptTooLong(
                    f"the prompt is {len(tokens)} tokens, the context holds {self.context} with at least one of reply",
                    hint="shorten it, raise --context, or let old tokens go: --overflow drop or window",
                )
            return tokens, window.NOTHING
        limit = window.prompt_limit(self.context, request.max_tokens)
        keep = request.keep if roll is None else roll.kept
        gone = window.cut(len(tokens), limit=limit, keep=keep, step=self.step)
        del tokens[gone.start : gone.stop]
        return tokens, gone

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


def _is_text(spelled: bytes) -> bool:
    try:
        spelled.decode("utf-8")
    except UnicodeDecodeError:  # part of a character
        return False
    return True
