"""Guesses and constraints on the demo model, through the public API."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch

import exl_runtime as exl
from exl_runtime import errors

GREEDY = exl.SamplingParams(temperature=0)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LIST = "Mira has a red apple, a green pear, a blue plum and an old map."
COPY = [{"role": "user", "content": f"Remember this and say it again: {LIST} {LIST}"}]
PROMPTS = ["Once upon a time", "The old man", "In the north of the country", QUESTION, COPY]
SAMPLERS = {
    "greedy": GREEDY,
    "plain": exl.SamplingParams(seed=4),
    "penalties": exl.SamplingParams(seed=5, repetition_penalty=1.1, dry_multiplier=0.8, xtc_probability=0.3),
    "mirostat": exl.SamplingParams(seed=6, mirostat=2, mirostat_tau=4.0),
    "adaptive": exl.SamplingParams(seed=7, adaptive_target=0.5, no_repeat_ngram_size=6),
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def rt():
    with exl.load("demo", threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def drafted(ember: Path):
    with exl.load("demo", threads=1, draft=ember, context=512) as runtime:
        yield runtime


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_text_with_and_without_guesses(rt, drafted, name: str) -> None:
    wanted = [rt.generate(prompt, max_tokens=70, sampling=SAMPLERS[name], speculate="off") for prompt in PROMPTS]
    assert not any(result.drafted_tokens for result in wanted)
    for runtime, mode in ((rt, "ngram"), (rt, "auto"), (drafted, "draft"), (drafted, "auto")):
        alone = [runtime.generate(p, max_tokens=70, sampling=SAMPLERS[name], speculate=mode) for p in PROMPTS]
        assert [r.ids for r in alone] == [r.ids for r in wanted], (mode, name)
        assert [r.text for r in alone] == [r.text for r in wanted]
        assert sum(result.accepted_tokens for result in alone) > 0
    together = drafted.generate(PROMPTS[:3], max_tokens=70, sampling=SAMPLERS[name], speculate="draft")
    assert [r.ids for r in together] == [r.ids for r in wanted[:3]]
    assert drafted.stats.accepted_tokens > 0 and drafted.stats.running == 0


def test_with_windows_stops_and_logprobs(rt) -> None:
    free = exl.SamplingParams(seed=1, ignore_eos=True)
    with exl.load("demo", threads=1, context=64) as small:
        results = [
            small.generate("Once", max_tokens=200, overflow="window", sampling=free, speculate=mode)
            for mode in ("off", "ngram")
        ]
    assert results[0].ids == results[1].ids and results[0].dropped_tokens > 0
    for options in ({"stop": " and"}, {"logprobs": 2}):
        plain, guessed = (
            rt.generate("The old man", max_tokens=60, sampling=GREEDY, speculate=mode, **options)
            for mode in ("off", "ngram")
        )
        assert (plain.ids, plain.text, plain.logprobs) == (guessed.ids, guessed.text, guessed.logprobs)


@pytest.mark.parametrize("cache", ["fp16", "q8", "k6v4"])
def test_with_every_kind_of_cache(cache: str) -> None:
    with exl.load("demo", threads=1, context=256, cache=cache) as runtime:
        for prompt in PROMPTS[:2]:
            results = [
                runtime.generate(prompt, max_tokens=60, sampling=GREEDY, speculate=mode) for mode in ("off", "ngram")
            ]
            assert results[0].ids == results[1].ids and results[1].drafted_tokens > 0


def test_a_draft_with_other_tokens_is_refused(demo: Path, tmp_path: Path) -> None:
    for file in demo.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(errors.UsageError, match="has other tokens: id"):
        exl.load("demo", draft=tmp_path, context=64)
    with pytest.raises(errors.UsageError, match="no draft model"):
        exl.load("demo", speculate="draft")
    with pytest.raises(errors.UsageError, match="auto, ngram, draft, off"):
        exl.load("demo", speculate="always")


def test_unknown_arguments_are_refused(rt) -> None:
    with pytest.raises(TypeError, match="banned_string'"):
        rt.generate("x", banned_string="y")


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_json_under_a_schema(rt, seed: int | None, mode: str) -> None:
    pytest.importorskip("llguidance")
    sampling = GREEDY if seed is None else exl.SamplingParams(seed=seed)
    grammar = exl.Grammar.json_schema(PERSON)
    results = rt.generate([QUESTION, "The old man"], max_tokens=200, sampling=sampling, grammar=grammar, speculate=mode)
    for result in results:
        value = json.loads(result.text)
        assert set(value) == {"name", "age"} and 0 <= value["age"] <= 99 and len(value["name"]) <= 12
        assert result.stop_reason in ("stop", "eos")


def test_grammars_with_and_without_guesses(rt) -> None:
    pytest.importorskip("llguidance")
    grammars = {
        "regex": (
            exl.Grammar.regex(r"[A-Z][a-z]{2,8} (is|was) [0-9]{1,3}\."),
            r"[A-Z][a-z]{2,8} (is|was) [0-9]{1,3}\.",
        ),
        "choice": (exl.Grammar.choice(["yes, (a)", "no [b]", "say\nmore"]), r"yes, \(a\)|no \[b\]|say\nmore"),
        "lark": (exl.Grammar.lark('start: "<" NAME ">" start?\nNAME: /[a-z]{1,6}/'), r"(<[a-z]{1,6}>)+"),
    }
    for grammar, pattern in grammars.values():
        for sampling in (GREEDY, exl.SamplingParams(seed=3, mirostat=2)):
            texts = {
                rt.generate(QUESTION, max_tokens=80, sampling=sampling, grammar=grammar, speculate=mode).text
                for mode in ("off", "ngram", "auto")
            }
            assert len(texts) == 1
            text = texts.pop()
            assert re.fullmatch(pattern, text) or text.startswith("<")  # the last may have been cut by max_tokens


def test_every_end_token_may_end_what_is_complete(rt) -> None:
    pytest.importorskip("llguidance")
    from exl_runtime.generation.matching import GrammarCompiler

    other = next(token for token in sorted(rt.tokenizer.special_ids) if token != rt.tokenizer.eos_id)
    ends = [rt.tokenizer.eos_id, other]
    matcher = GrammarCompiler(rt.tokenizer, 2048, frozenset(ends)).matcher(exl.Grammar.regex("a+"))
    assert not matcher.allowed()[ends].any()
    matcher.accept(rt.tokenizer.encode("a")[0])
    assert matcher.allowed()[ends].all()
    matcher.back(1)
    assert not matcher.allowed()[ends].any()


def test_forced_tokens_are_free(rt) -> None:
    pytest.importorskip("llguidance")
    grammar = exl.Grammar.regex("The quick brown fox jumps over the lazy dog and the cat[.!]")
    plain, guessed = (
        rt.generate(QUESTION, max_tokens=80, sampling=GREEDY, grammar=grammar, speculate=mode)
        for mode in ("off", "auto")
    )
    assert plain.ids == guessed.ids and re.fullmatch("The quick.* the cat[.!]", guessed.text)
    assert guessed.accepted_tokens > guessed.generated_tokens / 2


def test_tokens_that_end_a_reply(rt, drafted) -> None:
    whole = rt.generate(COPY, max_tokens=40, sampling=GREEDY)
    for runtime, mode in ((rt, "off"), (rt, "ngram"), (drafted, "draft")):
        for given in ([whole.ids[9], 5], {whole.ids[9]}, whole.ids[9]):
            cut = runtime.generate(COPY, max_tokens=40, sampling=GREEDY, speculate=mode, stop_ids=given)
            end = whole.ids.index(whole.ids[9])
            assert cut.ids == whole.ids[: end + 1] and cut.stop_reason == "stop"
            assert whole.text.startswith(cut.text) and cut.text == rt.tokenizer.decode(whole.ids[:end])
    assert rt.generate(COPY, max_tokens=40, sampling=GREEDY, stop_ids=None).ids == whole.ids
    for wrong in ("Par", [True], [-1], [1.5], ["1"]):
        with pytest.raises(errors.UsageError, match="stop_ids"):
            rt.generate("x", stop_ids=wrong)


def test_bad_grammars_and_a_missing_package(rt, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    for grammar, words in (
        (exl.Grammar.regex("(a"), "the regular expression cannot be used: .*regex"),
        (exl.Grammar.lark("nonsense ::= x"), "the grammar cannot be used: "),
        (exl.Grammar.json_schema({"type": "strange"}), "the JSON schema cannot be used: "),
    ):
        with pytest.raises(errors.UsageError, match=words):
            rt.generate("x", grammar=grammar)
    for wrong in (lambda: exl.Grammar.json_schema("{"), lambda: exl.Grammar.choice([]), lambda: exl.Grammar.regex("")):
        with pytest.raises(errors.UsageError):
            wrong()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(errors.UsageError, match="pip install llguidance"):
        rt.generate("x", grammar=exl.Grammar.regex("a"))
    assert rt.stats.running == 0 and rt.stats.pages_held == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_banned_strings_never_appear(rt, name: str) -> None:
    banned = ["the ", "Tim", "named", "was", "e"] if name == "greedy" else ["the ", "he w", "Paris", "little"]
    for prompt in PROMPTS[:4]:
        results = [
            rt.generate(prompt, max_tokens=40, sampling=SAMPLERS[name], banned_strings=banned, speculate=mode)
            for mode in ("off", "ngram")
        ]
        assert results[0].ids == results[1].ids
        for word in banned:
            assert word.lower() not in results[0].text.lower()
        assert rt.tokenizer.decode(results[0].ids) == results[0].text
    assert rt.stats.pages_held == 0


def test_a_ban_within_a_grammar(rt) -> None:
    pytest.importorskip("llguidance")
    grammar = exl.Grammar.choice(["red apple", "red pear", "redder than that", "blue plum"])
    for mode in ("off", "auto"):
        result = rt.generate(QUESTION, sampling=GREEDY, grammar=grammar, banned_strings=["red"], speculate=mode)
        assert result.text == "blue plum"
    with pytest.raises(errors.UsageError, match="the grammar, banned strings exclude all"):
        rt.generate(QUESTION, sampling=GREEDY, grammar=grammar, banned_strings=["red", "blue"])


def test_a_ban_in_a_stream_shows_nothing_it_takes_back(rt) -> None:
    told, ids = "", ()
    for event in rt.stream("The old man", max_tokens=60, sampling=GREEDY, banned_strings=["old man", "was"]):
        if isinstance(event, exl.Text):
            told, ids = told + event.text, ids + event.ids
        result = getattr(event, "result", None)
    assert told == result.text and ids == result.ids and "was" not in told


def test_beginnings(rt) -> None:
    for prefix in ("Well, ", "Żółw é", "In Par"):
        for mode in ("off", "auto"):
            result = rt.generate(QUESTION, max_tokens=30, sampling=GREEDY, prefix=prefix, speculate=mode)
            assert result.text.startswith(prefix) and len(result.text) > len(prefix)


def test_healing(rt) -> None:
    whole = rt.generate("Once upon a time", max_tokens=20, sampling=GREEDY)
    broken = rt.generate("Once upon a ti", max_tokens=20, sampling=GREEDY)
    healed = rt.generate("Once upon a ti", max_tokens=21, sampling=GREEDY, heal=True)
    assert healed.text == "me" + whole.text
    assert not broken.text.startswith("me")
    special = rt.generate(QUESTION, max_tokens=20, sampling=GREEDY, heal=True)  # ends in a template's own tokens
    assert "Paris" in special.text


def test_scores_of_a_prompt_are_those_of_its_logits(rt) -> None:
    ids = rt.tokenizer.encode("The capital of France is Paris.")
    result = rt.generate(ids, max_tokens=1, sampling=GREEDY, prompt_logprobs=3)
    exact = torch.log_softmax(rt.logits(ids).double(), dim=-1)
    for place, told in enumerate(result.prompt_logprobs[1:], 1):
        assert told.logprob == pytest.approx(float(exact[place - 1, ids[place]]), abs=1e-5) and len(told.top) == 3


def test_led_away_from_another_prompt(rt) -> None:
    other = [{"role": "user", "content": "What is the opposite of hot?"}]
    result = rt.generate(QUESTION, max_tokens=8, sampling=GREEDY, negative_prompt=other, guidance=1.5)
    here, there = list(rt.render(QUESTION).ids), list(rt.render(other).ids)
    for token in result.ids:
        with_it, against = (torch.log_softmax(rt.logits(ids)[-1], dim=-1) for ids in (here, there))
        assert token == int((against + 1.5 * (with_it - against)).argmax())
        here.append(token)
        there.append(token)
    assert rt.stats.pages_held == 0


def test_a_mixed_batch_is_each_as_if_alone(rt) -> None:
    """Grammar, ban, guesses, penalties side by side in one generator."""
    pytest.importorskip("llguidance")
    from exl_runtime.generation.request import Request

    chance = random.Random(3)
    kinds = [
        {"grammar": exl.Grammar.json_schema(PERSON)},
        {"banned_strings": ("the", "a s")},
        {"speculate": "off"},
        {"prefix": "Never "},
        {"stop": (". ",)},
        {},
    ]
    requests = [
        Request(
            prompt=tuple(rt.tokenizer.encode(chance.choice(PROMPTS[:3]))),
            max_tokens=40,
            sampling=chance.choice(list(SAMPLERS.values())),
            **kinds[k % len(kinds)],
        )
        for k in range(18)
    ]
    together = rt._generator.run(requests)
    alone = [rt._generator.run([one])[0] for one in requests]
    assert [(r.ids, r.text, r.stop_reason) for r in together] == [(r.ids, r.text, r.stop_reason) for r in alone]
    rt._generator.table.check()
