"""`template_args` of generate and stream: what the template makes of them is what the model reads."""

import logging

import pytest

import exl_runtime as exl
from exl_runtime.errors import UsageError

GREEDY = exl.SamplingParams(temperature=0, ignore_eos=True)
SOURCE = (
    "{{ bos_token }}{% if mood is defined %}<|user|>\nBe {{ mood }}.<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking is false %}Well, {% endif %}{% endif %}"
)
ASK = [{"role": "user", "content": "What is the capital of France?"}]
ARGS = {"enable_thinking": False, "mood": "kind"}


@pytest.fixture(scope="module")
def rt(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("template") / "made.jinja"
    file.write_text(SOURCE)
    with exl.load("demo", threads=1, context=512, template=file) as runtime:
        yield runtime


def test_the_model_reads_what_transformers_renders(rt) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    bos = rt.tokenizer.special_tokens["bos_token"]
    oracle = utils.render_jinja_template(
        [ASK], chat_template=SOURCE, add_generation_prompt=True, bos_token=bos, **ARGS
    )[0][0]
    assert "Be kind." in oracle and oracle.endswith("Well, ")
    rendered = rt.render(ASK, template_args=ARGS)
    assert rendered.text == oracle
    wanted = rt.generate(list(rendered.ids), max_tokens=12, sampling=GREEDY)
    for overflow in ("error", "drop", "window"):
        got = rt.generate(ASK, max_tokens=12, sampling=GREEDY, overflow=overflow, template_args=ARGS)
        assert (got.ids, got.prompt_tokens) == (wanted.ids, len(rendered.ids)), overflow
        stream = rt.stream(ASK, max_tokens=12, sampling=GREEDY, overflow=overflow, template_args=ARGS)
        assert "".join(event.text for event in stream if isinstance(event, exl.Text)) == wanted.text
    plain = rt.generate(ASK, max_tokens=12, sampling=GREEDY)
    assert plain.prompt_tokens < wanted.prompt_tokens


def test_what_leaves_is_counted_with_them(rt) -> None:
    talk = [{"role": role, "content": "one two three " * 8} for _ in range(9) for role in ("user", "assistant")]
    talk += ASK
    result = rt.generate(talk, max_tokens=20, sampling=GREEDY, overflow="drop", template_args=ARGS)
    assert result.dropped_turns
    kept = rt.render(talk[2 * result.dropped_turns :], template_args=ARGS).ids
    assert result.prompt_tokens == len(kept)
    assert result.ids == rt.generate(list(kept), max_tokens=20, sampling=GREEDY).ids


def test_the_prompt_it_is_led_away_from_has_them_too(rt) -> None:
    other = [{"role": "user", "content": "Tell me a story."}]
    ids = [list(rt.render(messages, template_args=ARGS).ids) for messages in (ASK, other)]
    options = {"max_tokens": 12, "sampling": GREEDY, "guidance": 1.5}
    wanted = rt.generate(ids[0], negative_prompt=ids[1], **options)
    assert rt.generate(ASK, negative_prompt=other, template_args=ARGS, **options).ids == wanted.ids
    assert rt.generate(ASK, negative_prompt=ids[1], template_args=ARGS, **options).ids == wanted.ids


def test_names_without_effect_are_told_once(rt, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "exl_runtime"):
        for _ in range(2):
            rt.generate(ASK, max_tokens=1, template_args={"enable_thinkng": False, "mood": "kind"})
    told = [record.getMessage() for record in caplog.records]
    assert told == ["the chat template never mentions the variable enable_thinkng: setting it has no effect"]


@pytest.mark.parametrize(
    ("prompt", "args", "said"),
    [
        ("text", {"mood": "kind"}, "for messages"),
        ([1, 2], {"mood": "kind"}, "for messages"),
        (ASK, {"messages": []}, "cannot be set"),
        (ASK, {"bos_token": ""}, "cannot be set"),
        (ASK, {"a b": 1}, "is no name"),
    ],
)
def test_refused(rt, prompt, args, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rt.generate(prompt, max_tokens=1, template_args=args)


def test_none_and_nothing_are_fine_everywhere(rt) -> None:
    for args in (None, {}):
        assert rt.generate("Once", max_tokens=1, template_args=args).generated_tokens == 1
        assert rt.render(ASK, template_args=args) == rt.render(ASK)
