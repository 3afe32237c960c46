"""`eval tasks` from its arguments to what it prints: on the demo model, and on models that misbehave."""

import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

import exl_runtime as exl
from eval.commands import tasks as command
from eval.tasks import asking, corpus, sandbox, suite
from eval.tasks.asking import Conversation, Settings, answer_part, ask, prompt_of
from eval.tasks.suite import Task
from exl_runtime.console.program import StrictParser
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import EvalError, PromptTooLong, StorageError, UsageError


def run(*arguments: str):
    parser = StrictParser()
    command.add(parser)
    return command.run(parser.parse_args([*arguments, "--threads", "1"]), QuietReporter(program="eval"))


def write(path, *records) -> str:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def rt():
    with exl.load("demo", threads=1) as runtime:
        yield runtime


@dataclass
class Scripted:
    """A runtime that says what a function of its prompt gives; `seen` keeps the calls."""

    reply: object
    template: object = "a template"
    seen: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.info = SimpleNamespace(name="scripted", format="exl2", bits_per_weight=4.0, context=100)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        return

    def generate(self, prompt, *, sampling, max_tokens, stop):
        if isinstance(prompt, list) and isinstance(prompt[0], list | str):
            return [
                self.generate(one, sampling=s, max_tokens=max_tokens, stop=stop)
                for one, s in zip(prompt, sampling, strict=True)
            ]
        self.seen.append((prompt, sampling, max_tokens, stop))
        text = self.reply(prompt)
        return SimpleNamespace(text=text, stop_reason="eos", generated_tokens=len(text))


@pytest.fixture
def scripted(monkeypatch):
    def use(reply, **options) -> Scripted:
        runtime = Scripted(reply, **options)
        monkeypatch.setattr(command, "open_model", lambda *_: runtime)
        return runtime

    return use


# --- on the demo ------------------------------------------------------------------------------------------------------


def test_the_builtin_suite_on_the_demo(tmp_path) -> None:
    output = tmp_path / "replies.jsonl"
    outcome = run("demo", "--limit", "3", "-o", str(output))
    rows = {row["category"]: row for row in outcome.facts["rows"]}
    assert rows["questions"]["score"] == 1.0 and rows["recall"]["score"] == 1.0  # what the demo was trained for
    assert "code" not in rows and any("--allow-code" in line for line in outcome.facts["left_out"])
    assert rows["overall"]["n"] == 15 and 0 < rows["overall"]["score"] < 1
    assert rows["overall"]["low"] < rows["overall"]["score"] < rows["overall"]["high"]
    mean = sum(rows[name]["score"] for name in rows if name != "overall") / 5
    assert rows["overall"]["score"] == pytest.approx(mean)
    read = suite.read_suite("builtin")
    for part in (read.sha256[:12], "15 tasks", "the model's chat template", "greedy", "at most 256", "bootstrap"):
        assert part in outcome.facts["protocol"] and part in outcome.text
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [
        task.id for task in suite.limited(read, 3).tasks if task.metric != "pass@1"
    ]
    paris = next(line for line in lines if line["answers"] == ["Paris"])
    assert "Paris" in paris["samples"][0]["judged"] and paris["score"] == 1.0
    json.dumps(outcome.facts, allow_nan=False)
    assert outcome.code == 0 and not outcome.facts["partial"]


def test_replies_depend_on_seed_and_task_only(rt) -> None:
    tasks = [Task(id=str(i), category="c", turns=(f"Tell me a story about {i} foxes.",), metric="em") for i in range(5)]
    settings = Settings(samples=2, temperature=1.0, seed=3, max_tokens=12)
    texts = {one.task.id + "/" + str(one.sample): one.replies for group in ask(rt, tasks, settings) for one in group}
    assert len(texts) == 10 and texts["0/0"] != texts["0/1"]
    again = {
        one.task.id + "/" + str(one.sample): one.replies for group in ask(rt, tasks[3:], settings) for one in group
    }
    assert again == {key: text for key, text in texts.items() if key[0] in "34"}
    same = [Task(id=name, category="c", turns=("Tell me a story.",), metric="em") for name in "ab"]
    first, second = (group[0].replies for group in ask(rt, same, Settings(temperature=1.0, max_tokens=12)))
    assert first != second
    other = next(ask(rt, tasks, Settings(samples=2, temperature=1.0, seed=4, max_tokens=12)))
    assert other[0].replies != texts["0/0"]


def test_a_batch_may_have_sampling_parameters_for_each_prompt(rt) -> None:
    prompts = ["Once upon a time", "The capital of"]
    sampling = [exl.SamplingParams(temperature=1.0, seed=seed) for seed in (1, 2)]
    together = rt.generate(prompts, max_tokens=8, sampling=sampling)
    alone = [rt.generate(p, max_tokens=8, sampling=s) for p, s in zip(prompts, sampling, strict=True)]
    assert [one.ids for one in together] == [one.ids for one in alone]
    with pytest.raises(UsageError, match="1 sampling parameters for 2 prompts"):
        rt.generate(prompts, sampling=sampling[:1])


def test_a_prompt_beyond_the_context_counts_as_an_empty_reply(tmp_path) -> None:
    path = write(
        tmp_path / "s.jsonl",
        {"id": "long", "prompt": "word " * 2000, "answer": "x"},
        {"id": "short", "prompt": "What is the capital of France?", "answer": "Paris", "metric": "contains"},
    )
    outcome = run("demo", "--suite", path, "--max-tokens", "24", "-o", str(tmp_path / "out"))
    assert "1 of them do not fit the context" in outcome.text
    first, second = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert (first["score"], second["score"]) == (0.0, 1.0) and "tokens" in first["samples"][0]["note"]


# --- turns, templates, samples ----------------------------------------------------------------------------------------


def test_turns_are_asked_one_after_another_with_the_replies_between() -> None:
    runtime = Scripted(lambda prompt: f"reply {len(prompt)}")
    task = Task(id="t", category="c", turns=("one", "two"), metric="em", system="brief", stop=("\n",), max_tokens=9)
    (conversation,) = next(ask(runtime, [task], Settings()))
    assert [m["content"] for m in runtime.seen[1][0]] == ["brief", "one", "reply 2", "two"]
    assert [m["role"] for m in runtime.seen[1][0]] == ["system", "user", "assistant", "user"]
    assert conversation.replies == ["reply 2", "reply 4"] and runtime.seen[0][2:] == (9, ("\n",))
    assert runtime.seen[0][1].greedy


def test_without_a_template_prompts_are_plain(scripted, tmp_path) -> None:
    runtime = scripted(lambda prompt: " 4", template=None)
    path = write(tmp_path / "s.jsonl", {"id": "a", "messages": ["x", "2+2="], "answer": 4})
    outcome = run("model", "--suite", path)
    assert [prompt for prompt, *_ in runtime.seen] == ["x", "x\n\n 4\n\n2+2="]
    assert "plain prompts" in outcome.facts["protocol"] and outcome.facts["rows"][0]["score"] == 1.0


def test_thoughts_are_not_judged() -> None:
    assert answer_part("<think>\nParis? No.\n</think>\n\nRome") == "Rome" == answer_part(" Rome ")
    one = Conversation(Task(id="t", category="c", turns=("p",), metric="em"), 0, replies=["a"], error="too long")
    assert one.verdict_text == ""
    assert prompt_of(one, chat=True)[0] == {"role": "user", "content": "p"}


def test_pass_at_k_over_samples(scripted, tmp_path, monkeypatch) -> None:
    replies = iter(["good", "bad", "bad", "good"])
    scripted(lambda prompt: next(replies))
    monkeypatch.setattr(
        sandbox, "run_code", lambda code, *_: sandbox.Verdict(passed=code == "good", reason=code, namespaces=True)
    )
    sandbox.isolation.cache_clear()
    path = write(tmp_path / "s.jsonl", {"id": "a", "prompt": "p", "tests": "f()"})
    outcome = run(
        "model", "--suite", path, "--allow-code", "--samples", "4", "--temperature", "1", "--metric", "pass@2"
    )
    sandbox.isolation.cache_clear()
    assert outcome.facts["rows"][0]["score"] == pytest.approx(1 - 1 / 6)  # of the 6 pairs one has no pass
    assert "code in a process of its own (10 s, 512 MiB" in outcome.text and "namespaces" in outcome.text


def test_weak_isolation_is_said(scripted, tmp_path, monkeypatch) -> None:
    scripted(lambda prompt: "x")
    monkeypatch.setattr(sandbox, "run_code", lambda *_: sandbox.Verdict(passed=True, reason="passed"))
    sandbox.isolation.cache_clear()
    path = write(tmp_path / "s.jsonl", {"id": "a", "prompt": "p", "tests": "f()"})
    outcome = run("model", "--suite", path, "--allow-code")
    sandbox.isolation.cache_clear()
    assert "WEAK isolation" in outcome.facts["protocol"]


# --- metrics from the command line ------------------------------------------------------------------------------------


def test_corpus_metrics_have_rows_of_their_own(scripted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "_SEGMENTS", 200)
    scripted(lambda prompt: "the cat sat on the mat")
    records = [
        {"id": f"{c}{i}", "category": c, "prompt": "p", "answer": f"the cat {i} sat on the mat", "metric": metric}
        for c, metric in (("one", "bleu"), ("two", "chrf"), ("three", "em"), ("four", "f1"))
        for i in range(2)
    ]
    outcome = run("model", "--suite", write(tmp_path / "s.jsonl", *records))
    rows = [(row["category"], row["metric"], row["n"]) for row in outcome.facts["rows"]]
    assert rows == [
        ("one", "bleu", 2), ("two", "chrf", 2), ("three", "em", 2), ("four", "f1", 2), ("overall", "mean", 4),
    ]  # fmt: skip
    assert "bleu: sacrebleu nrefs:1|case:mixed" in outcome.text and outcome.facts["rows"][0]["score"] > 1
    assert f"{outcome.facts['rows'][0]['score']:.2f}" in outcome.text
    every = run("model", "--suite", str(tmp_path / "s.jsonl"), "--metric", "bleu")
    assert [row["category"] for row in every.facts["rows"]] == ["one", "two", "three", "four", "overall"]


def test_own_metric_end_to_end(scripted, tmp_path, monkeypatch) -> None:
    scripted(lambda prompt: "four words are here")
    (tmp_path / "words_metric.py").write_text(
        "def count(prediction, answers, task):\n    return len(prediction.split())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    outcome = run("model", "--limit", "1", "--metric", "words_metric:count")
    assert {row["score"] for row in outcome.facts["rows"]} == {4.0} and "4.0000" in outcome.text


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--samples", "2"], UsageError, "--samples 2 without a temperature"),
        (["--metric", "rouge"], UsageError, "unknown metric 'rouge'"),
        (["--metric", "pass@1"], UsageError, "--allow-code"),
        (["--metric", "pass@3", "--allow-code"], UsageError, "pass@3 needs at least 3 samples"),
        (["-o", "no/such/folder"], StorageError, "its folder does not exist"),
        (["-o", "."], StorageError, "a folder"),
        (["--temperature", "-1"], UsageError, "not a number from 0 to 100"),
        (["--seed", "x"], UsageError, "not a whole number"),
    ],
)
def test_bad_arguments_are_known_before_a_model_is_opened(arguments, error, said) -> None:
    with pytest.raises(error, match=re.escape(said)):
        run("no-such-model", *arguments)


def test_bleu_without_sacrebleu_is_known_before_a_model_is_opened(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(EvalError, match="sacrebleu"):
        run("no-such-model", "--metric", "bleu")


# --- the end ----------------------------------------------------------------------------------------------------------


def test_interrupted_work_is_shown_and_marked(scripted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(asking, "BATCH", 4)
    count = iter(range(100))

    def reply(prompt) -> str:
        if next(count) == 6:
            raise KeyboardInterrupt
        return "4"

    scripted(reply)
    path = write(tmp_path / "s.jsonl", *({"id": str(i), "prompt": "2 + 2?", "answer": 4} for i in range(20)))
    outcome = run("model", "--suite", path, "-o", str(tmp_path / "out"))
    assert (outcome.code, outcome.facts["partial"], outcome.facts["asked"]) == (130, True, 4)
    assert "PARTIAL: interrupted after 4 of 20 tasks" in outcome.text
    assert len((tmp_path / "out").read_text().splitlines()) == 4


def test_interrupted_before_the_first_task_is_an_interrupt(scripted, tmp_path) -> None:
    def reply(prompt) -> str:
        raise KeyboardInterrupt

    scripted(reply)
    with pytest.raises(KeyboardInterrupt):
        run("model", "--limit", "1", "-o", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_that_does_not_fit_leaves_the_others_of_its_batch(scripted, tmp_path) -> None:
    def reply(prompt) -> str:
        if "long" in prompt[-1]["content"]:
            raise PromptTooLong("the prompt is 9 tokens, the context holds 4", hint="shorten it")
        return "x"

    scripted(reply)
    path = write(tmp_path / "s.jsonl", *({"id": p, "prompt": p, "answer": "x"} for p in ("a", "long", "b")))
    outcome = run("model", "--suite", path)
    assert outcome.facts["rows"][0]["score"] == pytest.approx(2 / 3)


def test_help_shows_the_format() -> None:
    parser = StrictParser(epilog=command.EPILOG)
    command.add(parser)
    shown = parser.format_help()
    for name in (*suite.METRICS, "messages", "tolerance", "pass@K", "max_words", "numbered"):
        assert name in shown
