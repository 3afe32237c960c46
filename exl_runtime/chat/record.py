"""What a session remembers: the tree of messages, system prompt, settings; in memory, and in a file where wanted.

Every change goes through `do`: first into the journal, then into the tree. A disk that fails ends the keeping, never
the conversation. Knows no runtime.
"""

from collections.abc import Sequence
from pathlib import Path

from ..errors import SessionError
from ..generation.stream import Text
from .history import Transcript
from .session_file import SessionFile
from .settings import ReplySettings
from .steps import Add, Grow, Settings, Settle, Step, System
from .tree import START, Node, Tree
from .turn import ReplyMeta


class Record:
    """One conversation. `problem` is why it is no longer kept in its file, until somebody has read it out."""

    def __init__(self, transcript: Transcript, settings: ReplySettings) -> None:
        self._transcript = transcript
        self._settings = settings
        self._file: SessionFile | None = None
        self._wanted: Path | None = None
        self.problem: SessionError | None = None
        self.changes = 0  # steps of the tree so far

    @property
    def tree(self) -> Tree:
        """The messages. Changed by `do` alone."""
        return self._transcript.tree

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._transcript.system

    @system.setter
    def system(self, text: str | None) -> None:
        self._note(System(text))
        self._transcript.system = text

    @property
    def settings(self) -> ReplySettings:
        """How replies are made."""
        return self._settings

    @settings.setter
    def settings(self, settings: ReplySettings) -> None:
        if settings != self._settings:
            self._note(Settings(settings.to_json()))
        self._settings = settings

    @property
    def file(self) -> Path | None:
        """The file that is kept up to date."""
        return None if self._file is None else self._file.path

    def do(self, step: Step) -> None:
        """Let `step` happen to the tree."""
        self._begin(step)
        self._note(step)
        self.tree.take(step)
        self.changes += 1
        if self._file is not None and self._file.due(step):
            try:
                self._file.compact(self.transcript())
            except SessionError as err:
                self._give_up(err)

    def add(self, parent: int, role: str, content: str, ids: Sequence[int] = ()) -> int:
        """A new message; its id."""
        id = self.tree.next_id
        self.do(Add(id, parent, role, content, None, tuple(ids)))
        return id

    def transcript(self, model: str | None = None) -> Transcript:
        """What a file should hold now."""
        self._transcript.settings = self._settings.to_json()
        self._transcript.model = self._transcript.model if model is None else model
        return self._transcript

    def keep(self, path: Path) -> None:
        """From the next message on: in a new file, which holds all there is by then."""
        self.release()
        self._wanted = path

    def kept(self, file: SessionFile) -> None:
        """From now on in `file`, which holds all there is."""
        self._file = file

    def release(self, *, discard: bool = False) -> None:
        """Bring the file up to date and let go of it; `discard` deletes it. Raises SessionError."""
        file, self._file, self._wanted = self._file, None, None
        if file is not None:
            file.close(None if discard else self.transcript())

    def _begin(self, step: Step) -> None:
        if self._wanted is None or not isinstance(step, Add):
            return
        path, self._wanted = self._wanted, None
        try:
            self._file = SessionFile.create(path, self.transcript())
        except SessionError as err:
            self._give_up(err)

    def _note(self, step: Step) -> None:
        if self._file is not None:
            try:
                self._file.append(step)
            except SessionError as err:
                self._give_up(err)

    def _give_up(self, err: SessionError) -> None:
        self.problem = err
        file, self._file = self._file, None
        if file is not None:
            file.abandon()


class GrowingReply:
    """The place in the record where the reply that is being made stands: a new message, or one that is continued."""

    def __init__(self, record: Record, asked: int, continued: Node | None, known: tuple[int, ...]) -> None:
        """`asked` is answered; `known`: the tokens of the reply that is continued."""
        self._record = record
        self._asked, self._continued, self._known = asked, continued, known
        self._id = START
        self._ids: tuple[int, ...] = ()

    def take(self, event: Text) -> None:
        """What was generated next."""
        self._ids += event.ids
        if event.text:
            step = Grow(self._place(), event.text, self._ids)
            self._ids = ()
            self._record.do(step)

    def settle(self, content: str, meta: ReplyMeta, ids: tuple[int, ...]) -> None:
        """It ended like this."""
        self._record.do(Settle(self._place(), content, meta, ids))

    def _place(self) -> int:
        if self._id != START:
            return self._id
        old = self._continued
        if old is None:
            self._id = self._record.add(self._asked, "assistant", "")
        elif self._record.tree.after(old.id):  # other messages answer the reply as it is
            self._id = self._record.add(self._asked, "assistant", old.turn.content, self._known)
        else:
            self._id = old.id
            self._record.do(Settle(old.id, old.turn.content, None, self._known))
        return self._id
