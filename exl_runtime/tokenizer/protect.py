"""Keeping control tokens out of reach of message texts.

Before rendering, every control token that a message spells out is wrapped in two marks; after rendering, the
marked places are encoded as ordinary text. What the template itself writes stays a control token. The marks are
Unicode noncharacters, which no text may contain for interchange; marks in the input are removed first.
"""

import re
from collections.abc import Iterable
from typing import Any

_START, _END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{_START}{_END}]")
_MARKED = re.compile(f"{_START}([^{_START}{_END}]*){_END}|[{_START}{_END}]")


def control_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first."""
    ordered = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def mark(value: Any, controls: re.Pattern[str]) -> Any:
    """A copy of the JSON-like `value` with every control token in its strings wrapped in marks (keys are left)."""
    if isinstance(value, str):
        return controls.sub(lambda match: f"{_START}{match[0]}{_END}", unmark(value))
    if isinstance(value, dict):
        return {key: mark(item, controls) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark(item, controls) for item in value]
    return value


def unmark(text: str) -> str:
    """`text` without marks: what a person should see."""
    return _MARKS.sub("", text)


def split(text: str) -> list[tuple[str, bool]]:
    """Pieces of `text` in order as (piece, is_plain); plain pieces are message texts that look like control tokens.

    A lone mark (a template may cut a marked text apart) is dropped but still separates its neighbours.
    """
    pieces = []
    for index, piece in enumerate(_MARKED.split(text)):
        if piece:
            pieces.append((piece, index % 2 == 1))
    return pieces
