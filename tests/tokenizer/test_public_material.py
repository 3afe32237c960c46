"""Public tokenizers and chat templates, against transformers. The material is not part of the repository."""

from pathlib import Path

import pytest

from exl_runtime.errors import TemplateError
from exl_runtime.tokenizer.template import ChatTemplate
from exl_runtime.tokenizer.tokenizer import Tokenizer

pytest.importorskip("transformers")

TEXTS = [
    "Hello world",
    "two  spaces\n\nand\ttabs ",
    "日本語 🎉👩‍👩‍👧 é ñ",
    "def f(x):\n    return {'a': 12345}\n",
    "I'll we're",
    "Привет мир",
    "",
]


@pytest.mark.parametrize("name", ["llama2", "phi-3", "smollm2", "qwen2.5"])
def test_tokenizers(shared: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = shared / "tokenizers" / name
    ours, oracle = Tokenizer.open(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(oracle)
    assert ours.bos_id == oracle.bos_token_id and ours.eos_id == oracle.eos_token_id
    assert {key: oracle.special_tokens_map.get(key) for key in ours.special_tokens} == ours.special_tokens
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False), text
        assert ids == ours.encode(text, parse_special=False)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True) == text
    chat = "<|user|>\nHi<|end|>\n<|im_start|>user\n</s><s>a<s>"
    assert ours.special_ids & set(ours.encode(chat))
    assert not ours.special_ids & set(ours.encode(chat, parse_special=False))


@pytest.mark.parametrize("name", ["llama2", "phi-3", "smollm2"])
def test_tokenizer_json_is_the_authority(shared: Path, name: str) -> None:
    """transformers rebuilds some classes from parts, with other rules for leading spaces; the file says what counts."""
    from transformers import PreTrainedTokenizerFast

    folder = shared / "tokenizers" / name
    ours = Tokenizer.open(folder)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in [*TEXTS, " Hello", "  two", "\u2581x"]:
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False)


def test_bos_rules(shared: Path) -> None:
    for name, expected in (("llama2", True), ("phi-3", True), ("smollm2", False), ("qwen2.5", False)):
        tokenizer = Tokenizer.open(shared / "tokenizers" / name)
        assert tokenizer.adds_bos is expected
        assert (tokenizer.encode("Hi", add_bos=None) != tokenizer.encode("Hi")) is expected


def test_turns_of_2023_checkpoints(shared: Path) -> None:
    """Their "<s>" is marked as normalized, and would be lost right behind "</s>"."""
    ids = Tokenizer.open(shared / "tokenizers" / "llama2").encode_rendered(
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]"
    )
    assert ids.count(1) == 2 and ids.count(2) == 1


CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather <of> a "city" é',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "City", "enum": ["Paris", "Rome"]},
                    "days": {"type": ["integer", "null"]},
                    "extra": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
                },
                "required": ["city"],
            },
        },
    }
]


def user(text: object) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": " Be brief. "}
CONVERSATIONS = [
    [user("Hi  there\n ")],
    [SYSTEM, user("Hi")],
    [user("Hi"), assistant(" Hello!\n"), user("é 日本 🎉 <b>&'\"")],
    [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    [user("a"), assistant("<think>hmm</think>\n\nb"), user("c")],
    [user("a"), assistant("b", reasoning_content="because"), user("c")],
    [
        user("weather?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "22", "tool_call_id": "call12345", "name": "get_weather"},
        assistant("22 degrees"),
        user("ok"),
    ],
    [user([{"type": "text", "text": "Hello"}, {"type": "text", "text": " you"}])],
    [assistant("x"), user("y")],
    [user("a"), user("b")],
    [{"role": "wizard", "content": "d"}],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def test_templates(shared: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    files = sorted((shared / "templates").glob("*.jinja"))
    assert len(files) > 50
    rendered = refused = 0
    for file in files:
        source = file.read_text("utf-8")
        try:
            template = ChatTemplate.from_text(source, where=file.name)
        except TemplateError:
            template = None
        for index, messages in enumerate(CONVERSATIONS):
            for tools, prompt in ((None, index % 2 == 0), (TOOLS, index % 2 == 1)):
                try:
                    expected = render_jinja_template(
                        [messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **SPECIAL
                    )[0][0]
                except Exception as err:
                    expected = err
                if isinstance(expected, str):
                    assert template is not None, file.name
                    got = template.render(messages, add_generation_prompt=prompt, tools=tools, template_args=SPECIAL)
                    assert got == expected, file.name
                    rendered += 1
                elif template is not None:
                    with pytest.raises(TemplateError) as caught:
                        template.render(messages, add_generation_prompt=prompt, tools=tools, template_args=SPECIAL)
                    if not isinstance(expected, RecursionError):
                        assert str(expected) in caught.value.problem
                    refused += 1
    assert rendered > 800 and refused > 100


def test_system_prompts_can_always_be_given(shared: Path) -> None:
    """Whatever the template thinks of system messages, fold_system gets the words into the prompt."""
    without = []
    for file in sorted((shared / "templates").glob("*.jinja")):
        try:
            template = ChatTemplate.from_text(file.read_text("utf-8"), where=file.name)
            template.render([user("Hi")], template_args=SPECIAL)
        except TemplateError:
            continue  # uses what transformers does not have either, or cannot do without tools
        if not template.supports_system:
            without.append(file.stem)
            assert "Be brief." in template.render(template.fold_system([SYSTEM, user("Hi")]), template_args=SPECIAL)
    assert "google-gemma-2-2b-it" in without and len(without) < 10
