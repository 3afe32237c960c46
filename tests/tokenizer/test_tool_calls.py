"""Calls of tools and thoughts found in replies, whatever the pieces they arrive in."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.tokenizer.reasoning import KNOWN, Marks, ReasoningSplitter, begins_inside, marks_of
from exl_runtime.tokenizer.tool_calls import (
    FENCED,
    FUNCTION,
    LIST,
    NAMED_LIST,
    PIPED,
    PYTHON,
    SECTIONS,
    TAGGED,
    ToolCall,
    ToolCallParser,
    syntaxes_of,
)

ALL = (TAGGED, LIST, PYTHON, SECTIONS, PIPED, NAMED_LIST, FENCED)
WEATHER = {"weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
OSLO = ToolCall("weather", '{"city": "Oslo"}')
ROME = ToolCall("weather", '{"city": "Rome"}')


def parse(text: str, syntaxes=ALL, schemas=WEATHER, size: int = 0) -> list:
    """The pieces of a reply that comes in parts of `size` characters (0: at once), neighbouring texts joined."""
    parser = ToolCallParser(syntaxes, schemas)
    parts = [text[i : i + size] for i in range(0, len(text), size)] if size else [text]
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    joined: list = []
    for piece in pieces:
        if joined and isinstance(piece, str) and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
# As the public vocabulary spells them, character by character.
BEGIN, END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
ONE, SEP, DONE = (f"<\uff5ctool\u2581{rest}\uff5c>" for rest in ("call\u2581begin", "sep", "call\u2581end"))
SECTION = f"{ONE}function{SEP}weather\n```json\n{{%s}}\n```{DONE}"
IN_OSLO, IN_ROME = (SECTION % f'"city": "{city}"' for city in ("Oslo", "Rome"))
CASES = {
    "sections": (f"I look.\n{BEGIN}{IN_OSLO}{END}", ["I look.", OSLO]),
    "sections, two": (f"{BEGIN}{IN_OSLO}\n{IN_ROME}{END}", [OSLO, ROME]),
    "sections, not closed": (f"{BEGIN}{IN_OSLO}", [OSLO]),
    "sections, name first": (
        f'{BEGIN}{ONE}weather{SEP}{{"city": "Oslo"}}{DONE}{END}',
        [OSLO],
    ),
    "sections, broken": (BEGIN + SECTION % '"city": ' + END, None),
    "sections, empty": (f"{BEGIN}{END}", None),
    "sections, no mark": (f"{BEGIN}{ONE}weather{{}}{END}", None),
    "piped": (f"<|tool_call|>[{CALL}, {CALL.replace('Oslo', 'Rome')}]<|/tool_call|>", [OSLO, ROME]),
    "named list": (f"functools[{CALL}, {CALL.replace('Oslo', 'Rome')}]", [OSLO, ROME]),
    "named list, broken": ("functools[0] is the first", None),
    "tagged": (f"<tool_call>\n{CALL}\n</tool_call>", [OSLO]),
    "tagged, text before": (f"I look.\n\n<tool_call>{CALL}</tool_call>", ["I look.", OSLO]),
    "tagged, two": (
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL.replace('Oslo', 'Rome')}</tool_call>\n",
        [OSLO, ROME],
    ),
    "tagged, not closed": (f"<tool_call>\n{CALL}", [OSLO]),
    "tagged, mark in a string": (
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        [ToolCall("weather", '{"city": "</tool_call>"}')],
    ),
    "tagged, any name": ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', [ToolCall("f", "{}")]),
    "tagged, arguments as text": (
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>',
        [OSLO],
    ),
    "tagged, typed parameters": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        [ToolCall("weather", '{"city": "Oslo", "days": 3}')],
    ),
    "tagged, no parameters": (
        "<tool_call>\n<function=weather>\n</function>\n</tool_call>",
        [ToolCall("weather", "{}")],
    ),
    "list": (f"[TOOL_CALLS] [{CALL}, {CALL.replace('Oslo', 'Rome')}]", [OSLO, ROME]),
    "list, with names": ('[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}', [OSLO]),
    "list, several names": (
        '[TOOL_CALLS]weather[CALL_ID]abc123[ARGS]{"city": "Oslo"}[TOOL_CALLS]weather{"city": "Rome"}',
        [OSLO, ROME],
    ),
    "python": ('<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}; ' + CALL, [OSLO, OSLO]),
    "bare": ('{"name": "weather", "parameters": {"city": "Oslo"}}', [OSLO]),
    "bare, blank space": ('\n {"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}\n', [OSLO]),
    "fenced": (f"So:\n```json\n{CALL}\n```\nDone.", ["So:", OSLO, "Done."]),
    # what is no call stays as it is
    "bare, not offered": ('{"name": "Bob", "age": 7, "city": "Oslo", "x": 1}', None),
    "bare, short": ('{"a": 1}', None),
    "bare, later a call": (f"{{x}} <tool_call>{CALL}</tool_call>", ["{x}", OSLO]),
    "fenced, not offered": ('See:\n```json\n{"name": "Bob", "arguments": {}}\n```\nand more', None),
    "fenced, not JSON": ("See:\n```json\n// {}\n```\n  and more  ", None),
    "tagged, broken": ('Hm. \n<tool_call>{"name": </tool_call> so', None),
    "tagged, broken, then good": (
        f"<tool_call>{{]</tool_call> <tool_call>{CALL}</tool_call>",
        ["<tool_call>{]</tool_call>", OSLO],
    ),
    "tagged, bad arguments": ('<tool_call>{"name": "weather", "arguments": "Oslo"}</tool_call>', None),
    "list, broken": ("[TOOL_CALLS] nothing", None),
    "python, code": ('<|python_tag|>weather.call(city="Oslo")', None),
    "a mark cut short": ("a <tool_", None),
    "blank space": ("  a \n\n b  \n", None),
    "deep": ("<tool_call>" + "[" * 3000 + "</tool_call>", None),
}


@pytest.mark.parametrize("name", CASES)
def test_calls(name) -> None:
    text, expected = CASES[name]
    expected = [text] if expected is None else expected
    for size in (0, 1, 7) if len(text) < 1000 else (0,):
        assert parse(text, size=size) == expected, f"in pieces of {size}"


def test_text_comes_out_at_once() -> None:
    parser = ToolCallParser(ALL, WEATHER)
    assert parser.push("Let me see") == ["Let me see"]
    assert parser.push(" <") == []
    assert parser.push("b> x") == [" <b> x"]
    assert parser.push("\n```json\n[1]\n``` then") == ["\n```json\n[1]\n```", " then"]


def test_the_function_form() -> None:
    text = 'a <function=weather>{"city": "Oslo"}</function> b'
    for size in (0, 1, 5):
        assert parse(text, (FUNCTION, FENCED), size=size) == ["a", OSLO, "b"]


def test_syntaxes_follow_the_template() -> None:
    assert syntaxes_of({"default": "x <tool_call> <function=a>"}) == (TAGGED, FENCED)
    assert syntaxes_of({"default": "x", "tool_use": "[TOOL_CALLS]"}) == (LIST, FENCED)
    assert syntaxes_of({"default": "<function=a>"}) == (FENCED, FUNCTION)[::-1]
    assert syntaxes_of({"default": "x"}) == (FENCED,)
    assert syntaxes_of({"default": "{{ '<|tool|>' + tools }}"}) == (PIPED, NAMED_LIST, FENCED)
    assert syntaxes_of({"default": f"{BEGIN}{{% for call in calls %}}"}) == (SECTIONS, FENCED)
    assert SECTIONS.marks == {BEGIN, END, ONE, SEP, DONE}


ATOMS = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "```json",
    "```",
    CALL,
    '{"name": "',
    "}",
    '"',
    "\\",
    " ",
    "\n",
    "word",
    "<",
    "[ARGS]",
    "<function=weather>",
    BEGIN,
    END,
    IN_OSLO,
    SEP,
    "<|tool_call|>",
    "<|/tool_call|>",
    "functools[",
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), max_size=10), st.integers(1, 9))
def test_the_cuts_do_not_matter(atoms, size) -> None:
    text = "".join(atoms)
    whole = parse(text)
    assert parse(text, size=size) == whole
    if not any(isinstance(piece, ToolCall) for piece in whole):
        assert "".join(whole) == text
    for call in whole:
        if isinstance(call, ToolCall):
            assert isinstance(json.loads(call.arguments), dict)


THINK = KNOWN[0]


def split(text: str, *, inside: bool = False, size: int = 0, marks: Marks = THINK) -> tuple[str, str]:
    """(reasoning, content) of a reply."""
    splitter = ReasoningSplitter(marks, inside=inside)
    parts = [text[i : i + size] for i in range(0, len(text), size)] if size else [text]
    found = [item for part in parts for item in splitter.push(part)] + splitter.finish()
    assert all(text for _, text in found)
    return tuple("".join(text for kind, text in found if kind == wanted) for wanted in ("reasoning", "content"))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_thoughts(size) -> None:
    assert split("<think>\nso  it\n</think>\n\nYes. ", size=size) == ("so  it", "Yes. ")
    assert split("\n<think>a</think>b", size=size) == ("a", "b")
    assert split("a</think>b", inside=True, size=size) == ("a", "b")
    assert split("a < b </thin", inside=True, size=size) == ("a < b </thin", "")
    assert split("No <think>a</think>", size=size) == ("", "No <think>a</think>")
    assert split(" <thin", size=size) == ("", " <thin")
    assert split("<think>\n\n</think>\n\nYes", size=size) == ("", "Yes")
    assert split("[THINK]a[/THINK]b", size=size, marks=KNOWN[1]) == ("a", "b")


def test_marks_follow_the_template() -> None:
    assert marks_of({"default": "... [THINK] ..."}).closing == "[/THINK]"
    assert marks_of({"default": "nothing"}) == THINK
    assert begins_inside("<|assistant|>\n<think>\n", THINK)
    assert not begins_inside("<think>\n\n</think>\n\n", THINK)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<", " ", "\n", "a", "</"]), max_size=9), st.booleans())
def test_cuts_do_not_matter_for_thoughts(atoms, inside) -> None:
    text = "".join(atoms)
    assert split(text, inside=inside, size=1) == split(text, inside=inside)
