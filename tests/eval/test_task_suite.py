"""Suites: what a file of tasks may say, what is refused and how, and that the built-in one can be solved."""

import json
from collections import Counter

import pytest

from eval.tasks import suite
from eval.tasks.judging import Judge
from exl_runtime.errors import DataError

GOOD = {"id": "a", "prompt": "2 + 2?", "answer": 4}


def write(tmp_path, *records) -> str:
    path = tmp_path / "suite.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_everything_a_line_may_say(tmp_path) -> None:
    path = write(
        tmp_path,
        "\ufeff" + json.dumps(GOOD),
        "",
        {
            "id": "b",
            "category": "talk",
            "messages": ["one", "two"],
            "system": "be brief",
            "answers": ["x", "y"],
            "metric": "f1",
            "stop": ["\n"],
            "max_tokens": 5,
            "note": "why",
        },
        {"id": "c", "prompt": "p", "tests": "assert f() == 1"},
        {"id": "d", "prompt": "p", "checks": {"max_words": 3}},
        {"id": "e", "prompt": "p", "answer": {"k": 1}},
        {"id": "f", "prompt": "p", "answer": "text"},
        {"id": "g", "prompt": "p", "answer": 2.5, "tolerance": 0.1},
    )
    read = suite.read_suite(path)
    assert [task.metric for task in read.tasks] == ["number", "f1", "pass@1", "instructions", "json", "em", "number"]
    talk = read.tasks[1]
    assert (talk.turns, talk.system, talk.texts) == (("one", "two"), "be brief", ["x", "y"])
    assert (talk.stop, talk.max_tokens, talk.category) == (("\n",), 5, "talk")
    assert read.tasks[0].category == "all" and read.tasks[6].tolerance == 0.1
    assert read.name == "suite.jsonl" and len(read.sha256) == 64


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a task is an object"),
        ('{"id": "a", "prompt": "p", "answer": NaN}', "NaN is not a value"),
        ("[" * 100_000, "not valid JSON"),
        ({"prompt": "p", "answer": 1}, 'no "id"'),
        ({**GOOD, "id": 7}, '"id" must be a text'),
        ({**GOOD, "promt": "p"}, "unknown field 'promt'"),
        ({**GOOD, "prompt": " "}, '"prompt" must be a text'),
        ({"id": "a", "answer": 1}, 'neither of "prompt" and "messages"'),
        ({**GOOD, "messages": ["x"]}, 'both of "prompt" and "messages"'),
        ({"id": "a", "messages": [], "answer": 1}, '"messages" must be a list of texts'),
        ({"id": "a", "messages": ["x", 1], "answer": 1}, '"messages" must be a list of texts'),
        ({**GOOD, "answers": [1]}, 'both of "answer" and "answers"'),
        ({"id": "a", "prompt": "p"}, 'the metric "em" needs "answer"'),
        ({"id": "a", "prompt": "p", "answers": []}, "at least one answer"),
        ({"id": "a", "prompt": "p", "answer": [1]}, "an answer is a text, a number or an object"),
        ({"id": "a", "prompt": "p", "answer": True}, "an answer is a text, a number or an object"),
        ({"id": "a", "prompt": "p", "answer": ""}, "an answer is an empty text"),
        ({**GOOD, "metric": "em"}, "needs text as its answer"),
        ({**GOOD, "metric": "json"}, "needs a JSON object"),
        ({"id": "a", "prompt": "p", "answer": "x", "metric": "number"}, "needs a number"),
        ({**GOOD, "metric": "rouge"}, "unknown metric 'rouge'"),
        ({**GOOD, "metric": "pass@0"}, "unknown metric"),
        ({**GOOD, "metric": "pass@1"}, 'needs "tests"'),
        ({**GOOD, "metric": "os:system"}, "may not name code to run"),
        ({**GOOD, "metric": "instructions"}, 'needs "checks"'),
        ({"id": "a", "prompt": "p", "tests": "assert ("}, '"tests" is not Python'),
        ({"id": "a", "prompt": "p", "checks": {}}, "at least one check"),
        ({"id": "a", "prompt": "p", "checks": {"most": 1}}, "unknown check 'most'"),
        ({"id": "a", "prompt": "p", "checks": {"max_words": "3"}}, 'the check "max_words" takes a number'),
        ({"id": "a", "prompt": "p", "checks": {"json": False}}, 'the check "json" takes true'),
        ({"id": "a", "prompt": "p", "checks": {"matches": "("}}, "no regular expression"),
        ({**GOOD, "tolerance": -1}, '"tolerance" must be a number from 0'),
        ({**GOOD, "max_tokens": 0}, '"max_tokens" must be a whole number'),
        ({**GOOD, "stop": "x"}, '"stop" must be a list of texts'),
        (GOOD, 'the id "a" is taken (line 1)'),
    ],
)
def test_a_bad_line_is_named(tmp_path, record, said) -> None:
    path = write(tmp_path, GOOD, record) if record == GOOD else write(tmp_path, {**GOOD, "id": "first"}, record)
    with pytest.raises(DataError) as caught:
        suite.read_suite(path)
    assert caught.value.problem.startswith(f"{path}: line 2: ")
    assert said in str(caught.value) and "\n" not in caught.value.problem


def test_bad_files_are_named(tmp_path) -> None:
    for path, said in ((tmp_path / "none", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(DataError, match=said):
            suite.read_suite(path)
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        suite.read_suite(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        suite.read_suite(tmp_path / "latin")


def test_limit_is_per_category() -> None:
    read = suite.read_suite("builtin")
    few = suite.limited(read, 2)
    assert set(Counter(task.category for task in few.tasks).values()) == {2} and len(few.tasks) == 12
    assert few.sha256 == read.sha256 and suite.limited(read, None) is read


def test_rank() -> None:
    assert [suite.rank(name) for name in ("pass@1", "pass@10", "pass@0", "pass@", "em", "pass@x", "pass@²")] == [
        1, 10, None, None, None, None, None,
    ]  # fmt: skip


# --- the built-in suite ----------------------------------------------------------------------------------------------

SOLVED = {
    "instructions": [
        "It is Madrid.", "C-a-t", "d-o-g", "Rain fell on the roof all night.", "- red\n- blue\n- green",
        "a lamp stands on the desk.", "HELLO AND WELCOME!", "Ice",
        "1. Boil the kettle.\n2. Warm the pot.\n3. Add the leaves.\n4. Pour and wait.",
        "I am away for a week. Please water my plants. Goodbye.", "The garden is small. It is full of roses.",
        '"The moon was full."', "[1, 2, 3]", "Perhaps it will snow.",
    ],
    "code": [
        "def add(a, b):\n    return a + b", "```python\ndef is_even(n):\n    return n % 2 == 0\n```",
        "def middle(t):\n    n = len(t)\n    return t[(n - 1) // 2 : n // 2 + 1] if t else ''",
        "from itertools import groupby\ndef runs(t):\n    return [(c, len(list(g))) for c, g in groupby(t)]",
        "def change(n):\n    k = 0\n    for c in (50, 20, 10, 5, 2, 1):\n        k += n // c\n"
        "        n %= c\n    return k",
        "def clock(m):\n    m %= 1440\n    return f'{m // 60:02d}:{m % 60:02d}'",
        "def balanced(t):\n    s = []\n    for c in t:\n        if c in '([':\n            s.append(c)\n"
        "        elif c in ')]':\n            if not s or s.pop() + c not in ('()', '[]'):\n"
        "                return False\n"
        "    return not s",
        "Sure:\n```py\ndef merge(a, b):\n    return sorted(a + b)\n```\nDone.",
    ],
}  # fmt: skip


def test_the_builtin_suite_is_large_enough_and_covers_what_it_should() -> None:
    read = suite.read_suite("builtin")
    counts = Counter(task.category for task in read.tasks)
    assert len(read.tasks) >= 60 and set(counts) == {
        "questions", "extraction", "arithmetic", "instructions", "recall", "code",
    }  # fmt: skip
    assert all(len(task.turns) > 1 for task in read.tasks if task.category == "recall")


def test_every_builtin_task_can_be_solved_and_an_empty_or_evasive_reply_scores_nothing() -> None:
    judge = Judge(allow_code=True)
    counts: Counter[str] = Counter()
    for task in suite.read_suite("builtin").tasks:
        solutions = SOLVED.get(task.category)
        reply = f"It is {task.texts[0]}." if solutions is None else solutions[counts[task.category]]
        if task.metric == "json":
            reply = f"```json\n{task.texts[0]}\n```"
        counts[task.category] += 1
        assert judge.judge(task, [reply]).score == 1.0, task.id
        if task.metric != "pass@1":
            assert judge.judge(task, ["", "I do not know that."]).score == 0.0, task.id
    assert all(counts[category] == len(solutions) for category, solutions in SOLVED.items())
