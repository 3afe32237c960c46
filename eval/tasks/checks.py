"""Instructions that a program can verify, after the idea of IFEval (Zhou et al. 2023, "Instruction-Following Evaluation
for Large Language Models"); the set is this project's own.

In a suite: "checks": {"max_words": 12, "forbids": ["blue"], "lower_case": true}
    min_words, max_words, min_sentences, max_sentences, min_lines, max_lines, bullets    a number (bullets: exactly)
    contains, forbids       words or phrases, whole, letter case aside
    starts_with, ends_with  texts, as they stand
    matches                 a regular expression that the whole reply matches
    lower_case, upper_case, no_commas, no_digits, one_word, json, quoted, numbered       true
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from exl_runtime.config.fields import shown
from exl_runtime.errors import DataError

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SENTENCE = re.compile(r"[.!?]+(?=\s|$|[\"')\]])")
_BULLET = re.compile(r"^\s*[-*•] \S", re.MULTILINE)
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_NUMBERED = re.compile(r"^\s*(\d+)[.)] \S", re.MULTILINE)


def words(text: str) -> int:
    """Runs of letters and digits; apostrophes and hyphens inside do not divide."""
    return len(_WORD.findall(text))


def sentences(text: str) -> int:
    """Ends of sentences; text behind the last of them counts as one more."""
    ends = list(_SENTENCE.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + (1 if words(rest) else 0)


def lines(text: str) -> int:
    """Lines that are not blank."""
    return sum(1 for line in text.split("\n") if line.strip())


def has_phrase(text: str, phrase: str) -> bool:
    """`phrase` as whole words, letter case aside."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def _whole_json(text: str) -> bool:
    """Nothing but JSON: an object or a list, with or without a fence around it."""
    block = _FENCED.fullmatch(text)
    try:
        value = json.loads(block.group(1) if block else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


def _in_order(text: str) -> bool:
    found = [int(one) for one in _NUMBERED.findall(text) if len(one) < 6]
    return len(found) > 1 and found == list(range(1, len(found) + 1))


_COUNTS: dict[str, Callable[[str, int], bool]] = {
    "min_words": lambda text, n: words(text) >= n,
    "max_words": lambda text, n: 0 < words(text) <= n,
    "min_sentences": lambda text, n: sentences(text) >= n,
    "max_sentences": lambda text, n: 0 < sentences(text) <= n,
    "min_lines": lambda text, n: lines(text) >= n,
    "max_lines": lambda text, n: 0 < lines(text) <= n,
    "bullets": lambda text, n: len(_BULLET.findall(text)) == n,
}
_PHRASES: dict[str, Callable[[str, list[str]], bool]] = {
    "contains": lambda text, phrases: all(has_phrase(text, phrase) for phrase in phrases),
    "forbids": lambda text, phrases: words(text) > 0 and not any(has_phrase(text, phrase) for phrase in phrases),
}
_PATTERNS: dict[str, Callable[[str, str], bool]] = {
    "starts_with": lambda text, start: text.startswith(start),
    "ends_with": lambda text, end: text.endswith(end),
    "matches": lambda text, pattern: re.fullmatch(pattern, text, re.DOTALL) is not None,
}
_FLAGS: dict[str, Callable[[str], bool]] = {
    "lower_case": lambda text: text.islower(),
    "upper_case": lambda text: text.isupper(),
    "no_commas": lambda text: bool(text) and "," not in text,
    "no_digits": lambda text: bool(text) and not any(char.isdigit() for char in text),
    "one_word": lambda text: len(text.split()) == 1,
    "json": _whole_json,
    "quoted": lambda text: len(text) > 2 and text[0] == text[-1] == '"',
    "numbered": _in_order,
}
NAMES = (*_COUNTS, *_PHRASES, *_PATTERNS, *_FLAGS)


def checked_checks(value: object, where: str) -> dict[str, Any]:
    """The "checks" of a task, as they are. Raises DataError that begins with `where`."""
    if not isinstance(value, dict) or not value:
        raise DataError(f'{where}: "checks" must be an object with at least one check, is {shown(value)}')
    for name, given in value.items():
        if name in _COUNTS:
            good, wanted = isinstance(given, int) and not isinstance(given, bool) and given >= 1, "a number from 1 up"
        elif name in _PHRASES:
            good = isinstance(given, list) and bool(given) and all(isinstance(one, str) and one for one in given)
            wanted = "a list of texts"
        elif name in _PATTERNS:
            good, wanted = isinstance(given, str) and bool(given), "a text"
        elif name in _FLAGS:
            good, wanted = given is True, "true"
        else:
            raise DataError(f"{where}: unknown check {shown(name)}", hint=f"known: {', '.join(NAMES)}")
        if not good:
            raise DataError(f'{where}: the check "{name}" takes {wanted}, is {shown(given)}')
        if name == "matches":
            try:
                re.compile(given)
            except (re.error, RecursionError, OverflowError) as err:
                raise DataError(f'{where}: the check "matches" is no regular expression: {err}') from err
    return value


def verdicts(reply: str, checks: Mapping[str, Any]) -> dict[str, bool]:
    """Which of `checks` hold for `reply`, blanks at its ends aside. An empty reply fulfils none of them."""
    text = reply.strip()
    result = {}
    for name, given in checks.items():
        if name in _FLAGS:
            holds = _FLAGS[name](text)
        else:
            holds = {**_COUNTS, **_PHRASES, **_PATTERNS}[name](text, given)
        result[name] = bool(text) and holds
    return result


def instructions(reply: str, checks: Mapping[str, Any]) -> float:
    """1 when every check holds, else 0: IFEval's strict accuracy per prompt."""
    return float(all(verdicts(reply, checks).values()))
