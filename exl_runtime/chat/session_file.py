"""A conversation that is kept while it goes on: its file, and beside it the journal of what happened since.

What survives: killing the program at any time loses nothing that was shown, at most the token being written. A power
cut loses at most the last SYNC_SECONDS of a reply: the journal is flushed to the disk (fdatasync) after every message
of the user, at the end of every reply and after every other change, and during a reply once in SYNC_SECONDS.
The file is written anew, whole or not at all, when a conversation is opened and closed, when something is deleted, and
when the journal has grown long; the journal starts again then. A crash between the two leaves a journal that names an
older file; it is not replayed. Knows no runtime.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..console.terminal import clean_line
from ..errors import SessionError
from . import history
from .checks import Wrong
from .history import Transcript
from .journal import Busy, Journal, Replay, journal_path, replay
from .steps import Grow, Remove, Step

SYNC_SECONDS = 1.0
LONG = 1 << 20  # bytes of journal from which on the file is written anew
DAMAGED = ".damaged"


def read_session(path: Path) -> tuple[Transcript, bool]:
    """A conversation with all that its journal adds, without touching either; True: the journal is damaged.

    Raises SessionError.
    """
    transcript = history.read(path)
    try:
        data = journal_path(path).read_bytes() if journal_path(path).is_file() else b""
    except OSError as err:
        raise SessionError(f"cannot read {clean_line(str(journal_path(path)))}: {err.strerror or err}") from err
    found = _replayed(transcript, data)
    return transcript, found.damaged


class SessionFile:
    """The file and the journal of one conversation, for this process alone."""

    def __init__(self, path: Path, journal: Journal, transcript: Transcript, clock: Callable[[], float]) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._journal = journal
        self._key, self._revision = transcript.key, transcript.revision
        self._clock = clock
        self._synced = clock()
        self._steps = 0  # in the journal

    @classmethod
    def create(cls, path: Path, transcript: Transcript, clock: Callable[[], float] = time.monotonic) -> "SessionFile":
        """Keep `transcript` in a new file. Raises SessionError."""
        transcript.key, transcript.revision = secrets.token_hex(8), 1
        history.write(path, transcript)
        with _naming(path):
            journal = Journal(journal_path(path))
            journal.restart(transcript.key, transcript.revision)
        return cls(path, journal, transcript, clock)

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.monotonic) -> tuple["SessionFile", Transcript, bool]:
        """Go on with the conversation in `path`; True: a damaged journal was put aside. Raises SessionError."""
        history.read(path)  # a foreign file gets no journal
        with _naming(path):
            journal = Journal(journal_path(path))
            try:
                transcript = history.read(path)
                data = journal.read()
                found = _replayed(transcript, data)
                if found.damaged:
                    history.write_private(Path(f"{journal.path}{DAMAGED}"), data)
                file = cls(path, journal, transcript, clock)
                if found.steps or not transcript.key:
                    file.compact(transcript)
                else:
                    journal.restart(transcript.key, transcript.revision)
            except BaseException:
                journal.close(remove=False)
                raise
        return file, transcript, found.damaged

    def append(self, step: Step) -> None:
        """Record one step. Raises SessionError."""
        with _naming(self.path):
            self._journal.append(step)
            self._steps += 1
            now = self._clock()
            if not isinstance(step, Grow) or now - self._synced >= SYNC_SECONDS:
                self._journal.sync()
                self._synced = now

    def due(self, step: Step) -> bool:
        """Whether the file should be written anew after `step`: what was deleted must not stay in the journal."""
        return isinstance(step, Remove) or (not isinstance(step, Grow) and self._journal.size > LONG)

    def compact(self, transcript: Transcript) -> None:
        """Write the file anew and start the journal again. Raises SessionError."""
        transcript.key = self._key = self._key or secrets.token_hex(8)
        transcript.revision = self._revision + 1
        history.write(self.path, transcript)
        self._revision += 1
        with _naming(self.path):
            self._journal.restart(self._key, self._revision)
        self._steps = 0

    def close(self, transcript: Transcript | None) -> None:
        """Write what the journal has into the file and remove the journal. Raises SessionError; it is closed anyway.

        None: the file is no longer wanted; it goes too.
        """
        try:
            if transcript is None:
                self.path.unlink(missing_ok=True)
            elif self._steps:
                self.compact(transcript)
        except (SessionError, OSError) as err:
            with suppress(OSError):
                self._journal.close(remove=False)
            raise SessionError(f"{clean_line(str(self.path))} could not be brought up to date: {err}") from err
        with _naming(self.path):
            self._journal.close(remove=True)

    def abandon(self) -> None:
        """Let go of both as they are, after an error."""
        with suppress(OSError):
            self._journal.close(remove=False)


def _replayed(transcript: Transcript, data: bytes) -> Replay:
    found = replay(data, transcript.key, transcript.revision)
    for number, step in enumerate(found.steps):
        try:
            transcript.take(step)
        except Wrong:
            return Replay(found.steps[:number], damaged=True)
    return found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the system says into a SessionError that names `path`."""
    name = clean_line(str(path))
    try:
        yield
    except Busy as err:
        raise SessionError(f"{name} is open in another program", hint="close it there first") from err
    except OSError as err:
        raise SessionError(f"cannot write {name}: {err.strerror or err}") from err
