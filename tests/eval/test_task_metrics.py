"""Metrics against definitions worked by hand, brute force, simulation, and sacrebleu called directly."""

import itertools
import random
import sys

import numpy
import pytest
import sacrebleu

from eval.tasks import bootstrap, checks, corpus
from eval.tasks.answers import contains, exact_match, f1, last_number, normalised, number
from eval.tasks.code import find_code, pass_at_k
from eval.tasks.custom import apply, load_metric
from eval.tasks.objects import field_accuracy, find_json, valid_json
from eval.tasks.suite import Task
from exl_runtime.errors import EvalError, UsageError

# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "answers", "em", "overlap"),
    [
        # Worked by hand: words after normalisation, precision, recall.
        ("Denver Broncos", ["Denver Broncos"], 1, 1.0),
        ("The Denver Broncos!", ["denver broncos"], 1, 1.0),
        ("the Broncos", ["Denver Broncos"], 0, 2 / 3),  # 1/1, 1/2
        ("the big red dog ran", ["red dog"], 0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # the article goes: 2/4, 2/2
        ("dog dog cat", ["dog cat cat"], 0, 2 / 3),  # as bags: one dog, one cat of three
        ("a b c", ["x y", "b"], 0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # "a" is an article; the best answer counts
        ("nothing", ["something else"], 0, 0.0),
        ("", ["x"], 0, 0.0),
        ("the", ["a"], 1, 1.0),  # both are empty after normalisation
        ("3,000", ["3000"], 1, 1.0),
        ("Theatre", ["Theatre"], 1, 1.0),  # begins with an article, is none
    ],
)
def test_exact_match_and_f1_of_squad(reply, answers, em, overlap) -> None:
    assert exact_match(reply, answers) == em
    assert f1(reply, answers) == pytest.approx(overlap, abs=1e-12)


def test_normalisation() -> None:
    assert normalised("  The  cat's an-swer, A.B.C. ") == "cats answer abc"


def test_contains_whole_words() -> None:
    assert contains("It is Rome, of course.", ["Rome"]) == 1
    assert contains("It is Romeo.", ["Rome"]) == 0
    assert contains("carbon and dioxide", ["carbon dioxide"]) == 0
    assert contains("at The One O'clock bell", ["one o'clock"]) == 1
    assert contains("anything", ["the"]) == 0  # nothing is left of the answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 = 7", 7),
        ("The answer is 1,250.50.", 1250.5),
        ("-4", -4),
        ("x = -4.5e2", -450),
        ("pages 3-4", 4),
        ("1, 2, 3", 3),
        ("1,23", 23),
        ("about $40.", 40),
        ("50%", 50),
        ("minus \u22125", -5),
        ("none", None),
        ("B12", None),
    ],
)
def test_last_number(text, value) -> None:
    found = last_number(text)
    assert (None if found is None else float(found)) == value


def test_number() -> None:
    assert number("so 0.30", [0.3]) == 1 and number("0.31", [0.3]) == 0
    assert number("0.31", [0.3], 0.01) == 1 and number("0.311", [0.3], 0.01) == 0
    assert number("five", [5]) == 0 and number("7", [5, 7.0]) == 1


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_is_found_in_running_text() -> None:
    assert find_json('Here {you} go: {"a": [1]} and {"b": 2}') == {"a": [1]}
    assert find_json('{"draft": 1}\n```json\n{"a": 2}\n```') == {"a": 2}
    assert find_json("[1, 2]") == [1, 2]
    for text in ("none", "{a: 1}", '{"a": ', "[" * 5000, '{"a": NaN}', "5"):
        with pytest.raises(ValueError):
            find_json(text)
        assert valid_json(text) == 0
    assert valid_json("[]") == 1


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"name": "Ines", "n": 3, "tags": ["x", "y"]}', 1.0),
        ('{"n": 3.0, "name": " Ines ", "tags": ["x", "y"]}', 1.0),
        ('{"name": "Ines", "n": "3", "tags": ["x", "y"]}', 3 / 4),  # a text is no number
        ('{"name": "Ines", "n": 3}', 2 / 4),
        ('{"name": "Ines", "n": 3, "tags": ["y", "x"]}', 2 / 4),
        ('{"name": "Ines", "n": 3, "tags": ["x", "y"], "more": null}', 4 / 5),  # invented
        ('{"name": "Ines", "n": true, "tags": ["x", "y"]}', 3 / 4),
        ("{}", 0.0),
        ("no", 0.0),
    ],
)
def test_field_accuracy(reply, score) -> None:
    assert field_accuracy(reply, [{"name": "Ines", "n": 3, "tags": ["x", "y"]}]) == pytest.approx(score)


def test_field_accuracy_takes_the_best_answer_and_tells_true_from_one() -> None:
    assert field_accuracy('{"a": 1}', [{"a": 2}, {"a": 1}]) == 1
    assert field_accuracy('{"a": 1}', [{"a": True}]) == 0
    assert field_accuracy('{"a": {}}', [{"a": {}}]) == 1


# --- instructions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"min_words": 3}, "one two-fold it's", "one two"),
        ({"max_words": 2}, "one two.", "one two three"),
        ({"min_sentences": 2}, "One. Two", "Version 2.5 is out."),
        ({"max_sentences": 1}, 'He said "no."', "One! Two?"),
        ({"min_lines": 2}, "a\n\nb", "a\n\n"),
        ({"max_lines": 1}, "a", "a\nb"),
        ({"bullets": 2}, "- a\n* b", "- a\n-b"),
        ({"contains": ["Ice", "cold tea"]}, "ice and COLD TEA", "nice cold tea"),
        ({"forbids": ["ice"]}, "nice", "Ice!"),
        ({"starts_with": "So"}, "So it is", "so it is"),
        ({"ends_with": "Bye."}, "OK. Bye. ", "Bye"),
        ({"matches": "a+.b"}, "aa\nb", "aabb c"),
        ({"lower_case": True}, "ab, 1", "aB"),
        ({"upper_case": True}, "AB, 1", "123"),
        ({"no_commas": True}, "a b", "a, b"),
        ({"no_digits": True}, "a", "a1"),
        ({"one_word": True}, "Ice.", "an ice"),
        ({"json": True}, '```json\n{"a": 1}\n```', 'Here: {"a": 1}'),
        ({"json": True}, "[1]", "{} {}"),
        ({"quoted": True}, '"Hi"', '"Hi" she said'),
        ({"numbered": True}, "1. a\n2. b", "1. a\n3. b"),
    ],
)
def test_each_check_can_hold_and_fail(check, good, bad) -> None:
    assert checks.checked_checks(check, "here") == check
    assert checks.instructions(good, check) == 1 and checks.instructions(bad, check) == 0
    assert checks.instructions("", check) == 0


def test_all_checks_must_hold() -> None:
    both = {"max_words": 2, "lower_case": True}
    assert checks.verdicts("Two words", both) == {"max_words": True, "lower_case": False}
    assert checks.instructions("Two words", both) == 0


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "passed", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 4, 2), (4, 0, 4), (7, 5, 3)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_pass(n, passed, k) -> None:
    draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_refuses_what_cannot_be_estimated() -> None:
    for n, passed, k in ((2, 1, 3), (2, 3, 1), (2, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(n, passed, k)


def test_code_is_found() -> None:
    assert find_code("x = 1") == "x = 1"
    assert find_code("So:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert find_code("```Python3\nx = '```'\n```") == "x = '```'\n"
    assert find_code("```\ncut") == "cut"


# --- BLEU and chrF ----------------------------------------------------------------------------------------------------

SAID = ["the cat sat on the mat", "there is a dog in the garden", "he reads an old book", "rain fell all night long"]
RIGHT = [
    ["a cat sat on the mat", "the cat sat on a mat"],
    ["a dog is in the garden"],
    ["he reads a book"],
    ["it rained"],
]


@pytest.mark.parametrize(("name", "direct"), [("bleu", sacrebleu.BLEU), ("chrf", sacrebleu.CHRF)])
def test_corpus_scores_are_those_of_sacrebleu(name, direct, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "_SEGMENTS", 800)
    ours = corpus.corpus_score(name, [[text] for text in SAID], RIGHT, seed=0)
    references = [[refs[i] if i < len(refs) else None for refs in RIGHT] for i in range(2)]
    scorer = direct()
    assert ours.score == scorer.corpus_score(SAID, references).score > 5
    assert ours.signature == str(scorer.get_signature()) and f"version:{sacrebleu.__version__}" in ours.signature
    assert ours.interval is not None and ours.interval.low <= ours.score <= ours.interval.high
    assert corpus.corpus_score(name, [[text] for text in SAID], RIGHT, seed=0) == ours


def test_samples_are_segments_of_one_corpus(monkeypatch) -> None:
    monkeypatch.setattr(corpus, "_SEGMENTS", 400)
    ours = corpus.corpus_score("chrf", [SAID[:2], SAID[2:]], [["a cat"], ["a book"]], seed=0)
    assert ours.score == sacrebleu.CHRF().corpus_score(SAID, [["a cat", "a cat", "a book", "a book"]]).score


def test_without_sacrebleu_one_line_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(EvalError) as caught:
        corpus.require_sacrebleu()
    assert "sacrebleu" in caught.value.problem and "pip install sacrebleu" in str(caught.value)


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [lambda r, n: r.random(n) < 0.6, lambda r, n: r.beta(2, 3, n)], ids=["binary", "share"]
)
def test_coverage_of_the_interval(draw) -> None:
    generator, runs, n = numpy.random.default_rng(5), 400, 60
    truth = 0.6 if draw(generator, 1).dtype == bool else 0.4
    hits = 0
    for run in range(runs):
        found = bootstrap.of_mean(draw(generator, n).astype(float).tolist(), run, resamples=400)
        hits += found is not None and found.low <= truth <= found.high
    # 95 % wanted. 400 runs have a standard error of 1.1 points; the percentile bootstrap is a little narrow at n = 60.
    assert 0.905 <= hits / runs <= 0.985


def test_interval_is_the_same_for_a_seed_and_says_when_it_means_nothing() -> None:
    scores = [0.0, 1.0, 1.0, 0.5] * 5
    assert bootstrap.of_mean(scores, 3) == bootstrap.of_mean(scores, 3) != bootstrap.of_mean(scores, 4)
    assert bootstrap.of_mean([1.0], 0) is None and bootstrap.of_mean([], 0) is None
    assert bootstrap.of_mean([1.0, 1.0], 0) == bootstrap.Interval(1.0, 1.0, degenerate=True)


def test_interval_of_a_mean_agrees_with_the_general_one() -> None:
    scores = random.Random(0).choices([0.0, 0.3, 1.0], k=40)
    mean = bootstrap.of_mean(scores, 0)
    general = bootstrap.of_statistic(lambda chosen: sum(scores[i] for i in chosen) / 40, 40, 0, resamples=2000)
    assert mean is not None and general is not None
    assert mean.low == pytest.approx(general.low, abs=0.02) and mean.high == pytest.approx(general.high, abs=0.02)


# --- metrics of the user's own ----------------------------------------------------------------------------------------

TASK = Task(id="t", category="c", turns=("p",), metric="em", answers=("x", 2), source={"id": "t", "note": "n"})


def test_own_metric_gets_reply_answers_and_task(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine_a.py").write_text(
        "def score(prediction, answers, task):\n"
        "    return len(prediction) + len(answers) * 10 + (task['note'] == 'n')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert apply("mine_a:score", load_metric("mine_a:score"), "abc", TASK) == 24.0


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("mine_b:f", "raise RuntimeError('broken')", "cannot be imported: RuntimeError: broken"),
        ("mine_c:f", "import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("mine_d:f", "def (", "cannot be imported: SyntaxError"),
        ("mine_e:f", "g = 1", "has no f"),
        ("mine_f:f", "f = 1", "is no function"),
        ("no_such_module_here:f", "", "No module named"),
        (":f", "", "not of the form"),
        ("mine:f()", "", "not of the form"),
    ],
)
def test_own_metric_that_cannot_be_had(tmp_path, monkeypatch, name, source, said) -> None:
    if name.startswith("mine_"):
        (tmp_path / f"{name[:6]}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UsageError) as caught:
        load_metric(name)
    assert said in caught.value.problem and "\n" not in caught.value.problem


@pytest.mark.parametrize("bad", [lambda p, a, t: 1 / 0, lambda p, a, t: "x", lambda p, a, t: float("nan")])
def test_own_metric_that_fails_names_itself_and_the_task(bad) -> None:
    with pytest.raises(EvalError, match='--metric m:f: task "t"'):
        apply("m:f", bad, "reply", TASK)
