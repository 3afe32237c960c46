"""A reply against right answers: exact match, F1, containment, numbers.

Exact match and F1 are those of SQuAD: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of
Text", section 6.1; the empty case as in the evaluation script of SQuAD 2.0.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Thousands may stand apart by commas; a minus behind a digit or letter is a dash ("3-4").
_NUMBER = re.compile(r"(?<![\w.])[-\u2212+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?")


def normalised(text: str) -> str:
    """SQuAD: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1 when the reply is one of the answers after normalisation, else 0."""
    return float(any(normalised(reply) == normalised(answer) for answer in answers))


def f1(reply: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over normalised words as a bag; the best over the answers."""
    return max(_f1(normalised(reply).split(), normalised(answer).split()) for answer in answers)


def contains(reply: str, answers: Sequence[str]) -> float:
    """1 when the words of one of the answers stand in the reply, in order and side by side, after normalisation.

    For sentences that hold the answer. A long reply holds many words by chance: bound it by max_tokens.
    """
    padded = f" {normalised(reply)} "
    return float(any((words := normalised(answer)) != "" and f" {words} " in padded for answer in answers))


def last_number(text: str) -> Decimal | None:
    """The last number written in digits ("so it is 1,250.50."), which benchmarks of arithmetic take; or None."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def number(reply: str, answers: Sequence[float], tolerance: float = 0.0) -> float:
    """1 when the last number of the reply is one of the answers, at most `tolerance` off, else 0."""
    said = last_number(reply)
    if said is None:
        return 0.0
    allowed = Decimal(repr(tolerance))
    return float(any(abs(said - Decimal(repr(answer))) <= allowed for answer in answers))


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(right)
    return 2 * precision * recall / (precision + recall)
