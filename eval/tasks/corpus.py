"""BLEU and chrF of a whole category, by sacrebleu: Post 2018, "A Call for Clarity in Reporting BLEU Scores" (BLEU of
Papineni et al. 2002, chrF2 of Popović 2015). Scores from 0 to 100; the signature stands beside them.

Texts go in as they are, blanks at their ends aside; tokenization is sacrebleu's default (13a for BLEU).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from exl_runtime.errors import EvalError

from . import bootstrap

NAMES = ("bleu", "chrf")
_SEGMENTS = 50_000  # scored in all resamples together: keeps the interval of a large suite within seconds
_FEWEST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusScore:
    """score and interval: 0 to 100. signature: what sacrebleu did, to be printed with the score."""

    score: float
    interval: bootstrap.Interval | None
    resamples: int
    signature: str


def require_sacrebleu() -> ModuleType:
    """The module, or EvalError."""
    try:
        import sacrebleu
    except ImportError as err:
        raise EvalError("BLEU and chrF need sacrebleu, which is not installed", hint="pip install sacrebleu") from err
    return sacrebleu


def corpus_score(
    name: str, replies: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], seed: int
) -> CorpusScore:
    """`name` ("bleu", "chrf") over all tasks.

    replies   per task, one or more samples; each is a segment of its own
    answers   per task, one or more references; tasks may differ in their number
    The interval draws tasks (all samples of one together) and scores the corpus anew; see `bootstrap`.
    """
    sacrebleu = require_sacrebleu()
    most = max(map(len, answers))

    def metric() -> Any:
        # Without this, sacrebleu warns about replies that look tokenized; they are a model's own.
        return sacrebleu.BLEU(force=True) if name == "bleu" else sacrebleu.CHRF()

    def score(chosen: Sequence[int], scorer: Any) -> Any:
        said, right = [], [[] for _ in range(most)]
        for index in chosen:
            for reply in replies[index]:
                said.append(reply.strip())
                for number, stream in enumerate(right):
                    # None: this segment has no reference of that number.
                    stream.append(answers[index][number] if number < len(answers[index]) else None)
        return scorer.corpus_score(said, right)

    scorer = metric()
    whole = score(range(len(replies)), scorer)
    segments = sum(map(len, replies))
    resamples = max(_FEWEST, min(bootstrap.RESAMPLES, _SEGMENTS // max(1, segments)))
    interval = bootstrap.of_statistic(
        lambda chosen: score(chosen, metric()).score, len(replies), seed, resamples=resamples
    )
    return CorpusScore(score=whole.score, interval=interval, resamples=resamples, signature=str(scorer.get_signature()))
