"""`ChatSession`: a conversation that can be continued, regenerated, edited, branched, saved and resumed.

Knows messages and the `Runtime` that answers them; knows no terminal, no template and no token beyond counting them.
Nothing that was said is lost: another reply, or an edited message, begins a branch beside the one that was there.
A reply that is interrupted keeps what was said; one that said nothing leaves the conversation as it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console.terminal import clean_line
from ..errors import SessionError, UsageError
from ..generation.request import Left, Result
from ..generation.stream import Dropped, Event, Finished, Text
from ..tokenizer.past import Past
from . import history
from .branching import Branching, checked
from .collected import Collected
from .continuing import continuation, joined, known_ids, led_away
from .history import Transcript
from .kv import KVBeside, remove_kv
from .recall import recall
from .record import GrowingReply, Record
from .session_file import SessionFile, read_session
from .settings import ReplySettings
from .steps import Go, Remove
from .thinking import Voice
from .tree import START, Node
from .turn import ReplyMeta, Turn
from .variables import read_args

if TYPE_CHECKING:
    from ..runtime import Runtime, Stream
    from ..sampling.params import SamplingParams

__all__ = ["ChatSession", "ReplyMeta", "ReplySettings", "Turn"]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A reply to make. `base`: the message that is answered, or the one after which the user says `says`."""

    base: int
    says: str | None = None
    continued: Node | None = None
    left: int = 0


class ChatSession(Branching):
    """One conversation with one model.

    `settings` may be replaced between replies. Every method that makes a reply exists twice: plain, returning the
    `Result`, and as `stream...`, yielding events, of which the last is `Finished`. Closing such a stream early, or an
    exception while it runs, keeps the text that was there. Messages of the user are counted from 0 along the present
    branch; -1 is the last.
    """

    def __init__(
        self,
        runtime: "Runtime",
        system: str | None = None,
        *,
        sampling: "SamplingParams | None" = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        overflow: str = "drop",
        settings: ReplySettings | None = None,
    ) -> None:
        """`settings` holds the four before it in one; give one or the other. Raises UsageError for bad values."""
        if settings is None:
            settings = ReplySettings(stop=tuple([stop] if isinstance(stop, str) else stop), overflow=overflow)
            settings = settings if sampling is None else replace(settings, sampling=sampling)
            settings = settings if max_tokens is None else replace(settings, max_tokens=max_tokens)
        self.runtime = runtime
        self._voice: Voice | None = None
        system = checked(system, "the system prompt") if system is not None else None
        super().__init__(Record(Transcript(system=system, model=runtime.info.name), settings))
        self.kv = KVBeside(lambda: (self.runtime, self.seen_messages, self._past_of(self.turns), self.template_args))
        self._stream: Stream | None = None  # of the reply that is being made
        self._stop_asked = False
        self._past = Past()

    # --- what there is ----------------------------------------------------------------------------------------

    @property
    def settings(self) -> ReplySettings:
        """How replies are made."""
        return self._record.settings

    @settings.setter
    def settings(self, settings: ReplySettings) -> None:
        if settings.template_args != self.settings.template_args:
            self._voice = None
        self._record.settings = settings

    @property
    def template_args(self) -> dict[str, Any]:
        """What of those in the settings the template of the present model reads."""
        return read_args(self.runtime, self.settings)

    @property
    def system(self) -> str | None:
        """The system prompt; setting it keeps the conversation."""
        return self._record.system

    @system.setter
    def system(self, text: str | None) -> None:
        self._check_idle()
        self._record.system = None if text is None else checked(text, "the system prompt")
        self._left = 0

    @property
    def voice(self) -> Voice:
        """How the replies of the model are read: what of them are thoughts."""
        if self._voice is None:
            self._voice = Voice.of(self.runtime, self.template_args)
        return self._voice

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation as chat templates want it, system prompt first."""
        return self._messages(self.turns)

    @property
    def seen_messages(self) -> list[dict[str, str]]:
        """The part of `messages` that still fits the context: what the model sees."""
        return self._messages(self.turns[self._left :])

    # --- replies ----------------------------------------------------------------------------------------------

    def send(self, text: str) -> Result:
        """Say something and return the reply."""
        return _last(self.stream(text))

    def stream(self, text: str) -> Iterator[Event]:
        """Say something; the events of the reply. A last message that got no reply is replaced."""
        current = self.tree.current
        if current != START and self.tree.nodes[current].turn.role == "user":
            current = self.tree.nodes[current].parent
        return self._reply(_Plan(current, checked(text, "a message"), left=self._left))

    def regenerate(self, index: int = -1) -> Result:
        """Answer message `index` again; the other replies stay beside it. Raises UsageError: nothing was said yet."""
        return _last(self.stream_regenerate(index))

    def stream_regenerate(self, index: int = -1) -> Iterator[Event]:
        """Like `regenerate`, as events."""
        node = self._user_node(index)
        last = node.id == self._user_node(-1).id
        return self._reply(_Plan(node.id, left=self._left if last else 0))

    def edit(self, index: int, text: str) -> Result:
        """Say something else instead of message `index` and return the reply.

        The message as it was stays, with all that followed, as another branch. Raises UsageError when there is none.
        """
        return _last(self.stream_edit(index, text))

    def stream_edit(self, index: int, text: str) -> Iterator[Event]:
        """Like `edit`, as events."""
        return self._reply(_Plan(self._user_node(index).parent, checked(text, "a message")))

    def edit_reply(self, index: int, text: str) -> None:
        """Put words into the model's mouth: `text` as its reply to message `index`, on a branch of its own.

        `extend` lets it go on from there. Raises UsageError.
        """
        self._check_idle()
        self._record.add(self._user_node(index).id, "assistant", checked(text, "a reply"))
        self._left = 0

    def extend(self) -> Result:
        """Let the model go on with its last reply, for example after `max_tokens` or an interruption."""
        return _last(self.stream_extend())

    def stream_extend(self) -> Iterator[Event]:
        """Like `extend`, as events. The reply keeps its place; its text grows."""
        path = self.tree.path()
        if not path or path[-1].turn.role != "assistant":
            raise UsageError("there is no reply to continue", hint="say something first")
        if self.settings.grammar is not None:
            raise UsageError(
                "a reply that has to follow a grammar is made in one go",
                hint="a larger max_tokens leaves it room; make it again, or take the grammar away",
            )
        return self._reply(_Plan(path[-1].parent, continued=path[-1], left=self._left))

    def cancel(self) -> None:
        """End the running reply; `Finished` follows and what was said is kept. Safe in a signal handler."""
        self._stop_asked = True
        if self._stream is not None:
            self._stream.cancel()

    def use(self, runtime: "Runtime") -> None:
        """Go on with another model. The one before is not closed."""
        self._check_idle()
        self.runtime, self._left, self._voice = runtime, 0, None

    # --- files ------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str], *, kv: bool = False) -> None:
        """Write the conversation as it is to a JSON file, all or nothing. Raises SessionError.

        kv  also what the cache holds of it, beside the file: `load` and `resume` then go on without computing it
        """
        transcript = self._record.transcript(self.runtime.info.name)
        history.write(Path(path), replace(transcript, key="", revision=0))
        if kv:
            self.kv.save(Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str], runtime: "Runtime") -> "ChatSession":
        """The conversation of a file, to go on with on any model. Raises SessionError for damaged files.

        The file stays as it is; `resume` goes on in it.
        """
        return cls._of(Path(path), read_session(Path(path))[0], runtime)

    @classmethod
    def resume(cls, path: str | PathLike[str], runtime: "Runtime") -> "ChatSession":
        """Like `load`, and the file is kept up to date from now on, as with `keep`. Raises SessionError."""
        file, transcript, _ = SessionFile.open(Path(path))
        try:
            session = cls._of(Path(path), transcript, runtime)
        except BaseException:
            file.abandon()
            raise
        session._record.kept(file)
        return session

    def keep(self, path: str | PathLike[str]) -> None:
        """From the next message on keep the conversation in a new file, so that a crash loses at most one token.

        Should that fail later, the conversation goes on; `keeping_problem` says why. Raises SessionError: it exists.
        """
        if Path(path).exists():
            raise SessionError(f"{clean_line(str(path))} exists", hint="ChatSession.resume goes on with a kept chat")
        self._record.keep(Path(path))

    def close(self, *, discard: bool = False) -> None:
        """Bring the file of `keep` or `resume` up to date and let go of it; `discard` deletes it instead.

        With `kv.auto`, its keys and values are written too. Raises SessionError.
        """
        file = self.file
        self._record.release(discard=discard)
        if file is None:
            return
        if discard:
            remove_kv(file)
        elif self.kv.auto and self.kv.due:
            self.kv.save(file)

    def _removed(self) -> None:
        if self.file is not None:
            self.kv.drop(self.file)  # it holds the tokens of what was deleted

    @property
    def file(self) -> Path | None:
        """The file that is kept up to date."""
        return self._record.file

    def keeping_problem(self) -> SessionError | None:
        """Why the conversation is no longer kept in its file; told once."""
        problem, self._record.problem = self._record.problem, None
        return problem

    @classmethod
    def _of(cls, path: Path, transcript: Transcript, runtime: "Runtime") -> "ChatSession":
        try:
            settings = ReplySettings.from_json(transcript.settings)
        except (UsageError, TypeError) as err:
            raise SessionError(f"{path} has settings this version does not take: {err}") from err
        session = cls(runtime, settings=settings)
        session._record = Record(transcript, settings)
        recall(runtime, session.tree.nodes.values())
        session.kv.try_open(path)
        return session

    # --- how a reply is made ----------------------------------------------------------------------------------

    def _reply(self, plan: _Plan) -> Iterator[Event]:
        """Checks now, runs when iterated: a stream that is never started changes nothing."""
        self._check_idle()
        self._stop_asked = False
        return self._run(plan, self._record.changes)

    def _run(self, plan: _Plan, since: int) -> Iterator[Event]:
        self._check_idle()
        record = self._record
        if record.changes != since:
            raise UsageError("the conversation went on since this stream was made", hint="make a new one")
        before = (record.tree.current, self._left)
        tokenizer = self.runtime.tokenizer
        known = () if plan.continued is None else known_ids(plan.continued, self.voice, tokenizer)
        collected = Collected()
        self._left, self._making = plan.left, True
        asked = plan.base if plan.says is None else record.add(plan.base, "user", plan.says)
        reply = GrowingReply(record, asked, plan.continued, known)
        turns = tuple(node.turn for node in record.tree.path(asked))
        voice = self.voice if self.settings.grammar is None else Voice()  # what follows a grammar is no thought
        reading = voice.reading(plan.continued)
        try:
            seen = self._messages(turns[self._left :])
            past, whole = self._past.of(turns[: self._left], self._message), None
            args = self.template_args
            more: dict[str, Any] = {"template_args": args} if args else {}
            more |= {"left": Left(past=past)} if past else {}
            if plan.continued is not None:
                whole = continuation(self.runtime, seen, known, self.settings, past, args)
                more = {"left": whole.left, "keep": whole.keep}
            self._stream = self.runtime.stream(
                seen if whole is None else list(whole.ids),
                max_tokens=self.settings.max_tokens,
                sampling=self.settings.sampling,
                stop=self.settings.stop,
                overflow=self.settings.overflow,
                **more,
                **self.settings.steering,
                **led_away(self.runtime, seen, known, self.settings, args),
                **voice.options,
            )
            with closing(self._stream):
                if self._stop_asked:  # while the prompt was prepared
                    self._stream.cancel()
                for event in voice.heard(self._stream if whole is None else whole.told(self._stream)):
                    collected.take(event)
                    if isinstance(event, Text):
                        reply.take(event)
                        reading.take(event)
                    elif isinstance(event, Dropped):
                        self._left = _skip(turns, self._left, event.turns)
                    if not isinstance(event, Finished):
                        yield event
        finally:
            # However it ended: what was said stays, and if nothing was said nothing happened.
            self._making, self._stream, self.kv.due = False, None, True
            result = collected.result()
            if result.text or (collected.complete and result.stop_reason not in ("cancelled", "deadline")):
                text, ids = result.text, result.ids
                if plan.continued is not None:
                    text, ids = joined(plan.continued, known, result, self.voice, tokenizer)
                reply.settle(text, _meta(result, reading.tokens), ids)
            else:
                if plan.says is not None:
                    record.do(Remove(asked))
                record.do(Go(before[0]))
                self._left = before[1]
        yield Finished(collected.request_id, result)

    # --- helpers ----------------------------------------------------------------------------------------------

    def _past_of(self, turns: tuple[Turn, ...]) -> bytes:
        """What stands for those of them that have left."""
        return self._past.of(turns[: self._left], lambda turn: turn.message)

    def _messages(self, turns: tuple[Turn, ...]) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(self._message(turn) for turn in turns)]

    def said(self, turn: Turn) -> str:
        """What a turn says: without thoughts, unless there is nothing else."""
        thoughts, answer = self.voice.parts(turn)
        return answer or thoughts

    def _message(self, turn: Turn) -> dict[str, str]:
        """Thoughts apart from the answer: the template knows what of them the model is to see again."""
        thoughts, answer = self.voice.parts(turn)
        return {"role": turn.role, "content": answer} | ({"reasoning_content": thoughts} if thoughts else {})


def _skip(turns: tuple[Turn, ...], start: int, count: int) -> int:
    """The place after `count` messages of the user, with the replies to them, from `start` on; never past the last."""
    users = [place for place in range(start, len(turns)) if turns[place].role == "user"]
    return users[min(count, len(users) - 1)]


def _meta(result: Result, thought_tokens: int) -> ReplyMeta:
    return ReplyMeta(
        stop_reason=result.stop_reason,
        prompt_tokens=result.prompt_tokens,
        reused_tokens=result.reused_tokens,
        generated_tokens=result.generated_tokens,
        seconds_prefill=result.seconds_prefill,
        seconds_decode=result.seconds_decode,
        dropped_tokens=result.dropped_tokens,
        dropped_turns=result.dropped_turns,
        thought_tokens=thought_tokens,
    )


def _last(events: Iterator[Event]) -> Result:
    for event in events:
        if isinstance(event, Finished):
            return event.result
    raise RuntimeError("a stream of events ended without Finished")
