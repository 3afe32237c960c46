"""Openings: usable by every tokenizer and template, and varied."""

from collections.abc import Sequence
from pathlib import Path

from convert.openings import OPENINGS, Message, chat_openings
from exl_runtime.errors import NoTemplate, TemplateError
from exl_runtime.tokenizer.template import ChatTemplate
from exl_runtime.tokenizer.tokenizer import Tokenizer


def test_openings_are_short_distinct_and_end_well() -> None:
    assert OPENINGS[0] == ""
    assert len(set(OPENINGS)) == len(OPENINGS) >= 40
    assert all(len(opening.split()) <= 15 and not opening.endswith(" ") for opening in OPENINGS)


def test_scripts_are_varied() -> None:
    blocks = {ord(character) >> 8 for opening in OPENINGS for character in opening}
    assert {0x00, 0x04, 0x06, 0x09, 0x30} <= blocks  # Latin, Cyrillic, Arabic, Devanagari, Kana
    assert any(0x4E00 <= ord(character) < 0xA000 for opening in OPENINGS for character in opening)


def test_chat_openings_of_a_real_template(ember: Path) -> None:
    tokenizer = Tokenizer.open(ember)
    template = ChatTemplate.open(ember, tokenizer)
    openings = chat_openings(lambda messages: template.encode(messages)[1])
    assert len(set(openings)) >= 12
    assert all(1 < len(opening) < 200 for opening in openings)


def test_refused_chats_are_left_out() -> None:
    def no_system(messages: Sequence[Message]) -> list[int]:
        if messages[0]["role"] == "system":
            raise TemplateError("system role not supported")
        return [len(messages), *map(ord, messages[0]["content"])]

    def everything(messages: Sequence[Message]) -> list[int]:
        return [len(messages)]

    some, every = chat_openings(no_system), chat_openings(everything)
    assert 8 <= len(some) < len(every)
    assert {opening[0] for opening in some} == {1, 3}  # one message, and a conversation


def test_no_template_no_chats() -> None:
    def none(messages: Sequence[Message]) -> list[int]:
        raise NoTemplate("no chat template")

    assert chat_openings(none) == ()
