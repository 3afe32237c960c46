"""The user's own editor for a message: $VISUAL, else $EDITOR. Knows processes and a file, no conversation."""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from ..console.terminal import clean_line, user_text
from ..errors import UsageError


def write_in_editor(text: str) -> str:
    """Let the user change `text`; the result, without blanks around it. Raises UsageError."""
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if not words:
        raise UsageError("no editor is set", hint="export EDITOR=nano, for example, before you start this program")
    descriptor, name = tempfile.mkstemp(prefix="exl-message-", suffix=".md")  # readable for its owner only
    path = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text + "\n" if text else "")
        try:
            code = subprocess.run([*words, name], check=False).returncode
        except OSError as err:
            raise UsageError(f"{clean_line(words[0], 80)} cannot be started: {err.strerror or err}") from err
        if code:
            raise UsageError(f"{clean_line(words[0], 80)} ended with code {code}: the message is not sent")
        return user_text(path.read_bytes().decode("utf-8", "surrogateescape")).strip()
    finally:
        path.unlink(missing_ok=True)
