"""Variables of chat templates: values typed by people, names that may be set, and which of them a template reads."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_runtime.errors import UsageError
from exl_runtime.tokenizer.template import ChatTemplate
from exl_runtime.tokenizer.template_args import checked_args, name_and_value, spelled, unmentioned_line, value_of

PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
TEXT = st.one_of(st.text(), st.sampled_from(["off", "False", "null", "1", " x ", '"a"', "NaN", "default", ""]))
VALUES = st.recursive(PLAIN | TEXT, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("true", "True", "on", "YES")),
        *((word, False) for word in ("false", "False", "off", " no ")),
        ("high", "high"),
        ("12", 12),
        ("-1.5", -1.5),
        ("null", None),
        ('"off"', "off"),
        ('{"a": [1, true]}', {"a": [1, True]}),
        ("[1", "[1"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("[" * 100_000, "[" * 100_000),
        ("26 Jul 2024", "26 Jul 2024"),
    ],
)
def test_values(text: str, value: object) -> None:
    found = value_of(text)
    assert found == value and type(found) is type(value)


@given(value=VALUES)
def test_a_value_can_be_typed_as_it_is_shown(value: object) -> None:
    for text in (spelled(value), f" {spelled(value)} "):
        assert json.dumps(value_of(text)) == json.dumps(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("enable_thinking", "NAME=VALUE"),
        ("enable-thinking=false", "letters, digits and _"),
        ("=1", "is no name"),
        *((f"{name}=x", "cannot be set") for name in ("messages", "tools", "add_generation_prompt", "bos_token")),
        ("raise_exception=1", "cannot be set"),
    ],
)
def test_names_that_cannot_be_set(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        name_and_value(text)


def test_name_and_value() -> None:
    assert name_and_value("enable_thinking=off") == ("enable_thinking", False)
    assert name_and_value("a = b=c") == ("a", "b=c")


@pytest.mark.parametrize("given", [[("a", 1)], {"a": float("nan")}, {"a": object()}, {"tools": 1}, {1: 2}, "a=1"])
def test_arguments_that_cannot_be_kept(given: object) -> None:
    with pytest.raises(UsageError):
        checked_args(given)


def test_arguments_are_a_copy() -> None:
    inner = [1, (2,)]
    found = checked_args({"a": inner})
    inner.append(3)
    assert found == {"a": [1, [2]]}


def test_what_a_template_reads() -> None:
    source = (
        "{{ bos_token }}{% set own = 1 %}{% if x is defined %}{% set y = x %}{% endif %}{{ own }}"
        "{% if z is not defined %}{% set z = 2 %}{% endif %}{% for m in messages %}{{ m.content }}{{ y }}{% endfor %}"
        "{% if add_generation_prompt %}{{ raise_exception(z) }}{% endif %}"
    )
    template = ChatTemplate.from_text(source)
    assert template.variables == ("x", "z"), "y is the template's own"
    assert template.unmentioned(("x", "y", "z", "own", "q", "content")) == ("own", "q", "content")
    several = ChatTemplate({"default": "{{ a }}", "tool_use": "{{ b }}"}, None, where="here")
    assert several.variables == ("a", "b") and several.unmentioned(["a", "b", "c"]) == ("c",)
    assert unmentioned_line(["c"]).endswith("never mentions the variable c: setting it has no effect")


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("Qwen-Qwen3-0.6B", {"enable_thinking"}),
        ("deepseek-ai-DeepSeek-V3.1", {"thinking", "enable_thinking"}),
        ("ibm-granite-granite-3.3-2B-Instruct", {"thinking", "documents", "controls"}),
        ("openai-gpt-oss-120b", {"reasoning_effort", "builtin_tools", "model_identity"}),
        ("meta-llama-Llama-3.1-8B-Instruct", {"date_string", "builtin_tools", "custom_tools"}),
        ("google-gemma-2-2b-it", set()),
    ],
)
def test_what_public_templates_read(shared: Path, name: str, some: set[str]) -> None:
    template = ChatTemplate.from_text((shared / "templates" / f"{name}.jinja").read_text("utf-8"))
    assert some <= set(template.variables) and template.unmentioned(some) == ()
    own = {"content", "loop_messages", "system_message", "role", "messages", "tools", "message"}
    assert not own & set(template.variables)
    assert template.unmentioned(["zq7"]) == ("zq7",)
