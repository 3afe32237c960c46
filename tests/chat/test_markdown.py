"""Streamed Markdown: where it is cut, how wide it gets, and what a person sees on the screen."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from vt import Terminal

from exl_runtime.chat.blocks import BlockSplitter, code_blocks
from exl_runtime.chat.live import LiveRegion
from exl_runtime.chat.markdown import render_lines, visible_width
from exl_runtime.chat.reply import PlainReply, StyledReply

SAMPLE = (
    "# Title\nA paragraph with **bold** words, `code`, and 日本語の文字 in it. " * 3
    + "\n\nAnother.\n\n- one\n- two\n\n- three\n  with more\n\n  ```py\n  x = 1\n\n  y = 2\n  ```\n\n"
    + "1. first\n2. second\n\nThen code:\n```python\n"
    + "".join(f'def f{i}(x):\n    return "日本" * {i}\n\n' for i in range(12))
    + "```\nafter it\n\n| a | b |\n|---|---|\n| 1 | 日本 |\n\n> quoted\n> text\n\n~~~\ntilde ``` inside\n~~~\nend"
)


def split(text: str, sizes: Iterator[int] | None = None) -> list[str]:
    splitter, blocks = BlockSplitter(), []
    at = 0
    while at < len(text):
        size = next(sizes) if sizes else len(text)
        blocks += splitter.push(text[at : at + size])
        at += size
    return blocks + splitter.finish()


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("a\nb\n\nc", ["a\nb", "c"]),
        ("\n\n\na\n\n\n\nb\n\n", ["a", "b"]),
        ("# t\ntext", ["# t", "text"]),
        ("text\n# t\n", ["text", "# t"]),
        ("```py\na\n\nb\n```\nc", ["```py\na\n\nb\n```", "c"]),
        ("a\n```\nb\n```", ["a", "```\nb\n```"]),
        ("````\n```\n````\nx", ["````\n```\n````", "x"]),
        ("~~~\n```\n~~~\nx", ["~~~\n```\n~~~", "x"]),
        ("```\nopen\n\nstill", ["```\nopen\n\nstill"]),
        ("```a`b\n\nc", ["```a`b", "c"]),
        ("- a\n\n- b\n\ntext", ["- a\n\n- b", "text"]),
        ("- a\n\n  more\n\ntext", ["- a\n\n  more", "text"]),
        ("- a\n\n      ```\n\n      x\n      ```\n\nt", ["- a\n\n      ```\n\n      x\n      ```", "t"]),
        ("see:\n- a\n\n- b", ["see:\n- a\n\n- b"]),
        ("- a\nlazy\n\nb", ["- a\nlazy", "b"]),
        ("1. a\n\n2. b\n\n---\n\nc", ["1. a\n\n2. b", "---", "c"]),
        ("    code\n\n    more\n\ntext", ["    code\n\n    more", "text"]),
    ],
)
def test_blocks_end_where_nothing_can_change_them(text: str, blocks: list[str]) -> None:
    assert split(text) == blocks
    assert split(text, iter([1] * len(text))) == blocks


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["a", " ", "  ", "    ", "\n", "\n\n", "```", "```py\n", "~~~", "- ", "1. ", "# ", "> ", "|", "日"]
        ),
        max_size=40,
    ),
    st.lists(st.integers(1, 5), min_size=1, max_size=20),
)
def test_blocks_do_not_depend_on_the_pieces_and_lose_nothing(parts: list[str], sizes: list[int]) -> None:
    text = "".join(parts)
    blocks = split(text)
    assert split(text, iter((sizes * (len(text) + 1))[: len(text) + 1])) == blocks
    assert "".join("".join(blocks).split()) == "".join(text.split())


def test_the_tail_is_what_was_not_cut_yet() -> None:
    splitter = BlockSplitter()
    assert splitter.push("one\n\ntw") == ["one"]
    assert splitter.tail == "tw"
    splitter.push("o\n\n```py\nx = 1\ny")
    assert splitter.fence is not None and splitter.fence.info == "py"
    assert splitter.code_lines == ["x = 1"]
    assert splitter.tail == "```py\nx = 1\ny"


def test_code_blocks_are_found() -> None:
    assert code_blocks("a\n```py\nx\n\ny\n```\nb\n- c\n  ~~~\n  z\n  ~~~\n```\nopen") == ["x\n\ny", "  z", "open"]


def console(terminal: Terminal) -> Console:
    return Console(
        file=terminal,
        force_terminal=True,
        color_system="truecolor",
        width=terminal.columns,
        height=terminal.lines,
        legacy_windows=False,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["word ", "日本語", "🙂", "**", "`", "\n", "\n\n", "- ", "```\n", "|a|b|\n|-|-|\n", "# ", "é", "<b>"]
        ),
        max_size=40,
    ),
    st.integers(12, 70),
)
def test_no_line_is_wider_than_asked(parts: list[str], width: int) -> None:
    for line in render_lines("".join(parts), console(Terminal(80, 24)), width):
        assert visible_width(line) <= width
        assert "\n" not in line


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mred",
        "<http://a/%1b%5b31mred>",
        "[x](http://a/%1b[2J)",
        "&#27;[31m &#x9b;31m &#13; &#8;",
        "```\n\x1b]0;title\x07\n```",
        "```\x1b[31m\ncode\n```",
        "`\x9b31m`",
        "| \x1b[5m | b |\n|---|---|",
        "# \x1b[31m",
    ],
)
def test_no_escape_of_the_text_reaches_the_terminal(text: str) -> None:
    plain = Console(file=Terminal(), force_terminal=True, color_system=None, width=80)
    for line in render_lines(text, plain, 79):
        assert all(char >= " " and not "\x7f" <= char < "\xa0" for char in _without_styles(line)), repr(line)


def _without_styles(line: str) -> str:
    """rich still underlines and emboldens without colours; a style ends in m and holds these numbers only."""
    import re

    return re.sub(r"\x1b\[(?:0|[1-9])(?:;[1-9])*m", "", line)


def test_text_is_never_lost() -> None:
    shown = "\n".join(render_lines("a <think>b</think> c\nnew line\n<div>x</div>", console(Terminal()), 60))
    for part in ("<think>b</think>", "\nnew line", "<div>x</div>"):
        assert part in shown


def test_hostile_nesting_is_survived_and_stays_readable() -> None:
    for text in (">" * 3000 + " x", "- " * 500 + "x", "[name]: http://example.org"):
        assert any(line.strip() for line in render_lines(text, console(Terminal()), 60))


def show(text: str, *, seed: int, columns: int = 50, lines: int = 12) -> Terminal:
    random_ = random.Random(seed)
    terminal, now = Terminal(columns, lines), [0.0]
    terminal.feed("earlier\n")
    reply = StyledReply(console(terminal), clock=lambda: now[0])
    reply.waiting("reading 12 tokens")
    at = 0
    while at < len(text):
        size = random_.randint(1, 9)
        reply.text(text[at : at + size])
        at += size
        now[0] += random_.choice((0.001, 0.01, 0.03))
    reply.finish()
    terminal.feed("later\n")
    return terminal


def test_a_streamed_reply_looks_the_same_however_it_came() -> None:
    whole = show(SAMPLE, seed=0, lines=300).everything
    for seed in range(3):
        assert show(SAMPLE, seed=seed, lines=random.Random(seed).choice((8, 12, 30))).everything == whole


def test_nothing_around_the_reply_is_touched() -> None:
    terminal = show(SAMPLE, seed=3)
    rows = terminal.everything
    assert rows[0] == "earlier" and rows[-1] == "later"
    text = "\n".join(rows)
    assert "reading 12" not in text
    for number in range(12):
        assert text.count(f"def f{number}(x):") == 1
        assert text.count(f'return "日本" * {number}\n') == 1


def test_only_changed_lines_are_written_again() -> None:
    terminal, now = Terminal(60, 20), [0.0]
    reply = StyledReply(console(terminal), clock=lambda: now[0])
    written: list[str] = []
    terminal.write = lambda text: written.append(text) or len(text)  # type: ignore[method-assign]
    for number in range(30):
        reply.text(f"line number {number}\n" if number % 10 else f"\n\nline number {number}\n")
        now[0] += 1
    reply.finish()
    everything = "".join(written)
    assert everything.count("line number 3") <= 3, "a finished line is not drawn over and over"
    assert "\x1b[2J" not in everything and "\x1b[H" not in everything, "the screen is never cleared"
    assert all(text.startswith("\x1b[?2026h") and text.endswith("\x1b[?2026l") for text in written if text)


def test_the_live_part_never_exceeds_the_screen() -> None:
    """A cursor that must go up further than the screen is tall would write over the wrong lines."""
    import re

    terminal, highest = Terminal(30, 8), 0
    feed = terminal.feed

    def watch(text: str) -> None:
        nonlocal highest
        highest = max([highest, *(int(n) for n in re.findall(r"\x1b\[(\d+)A", text))])
        feed(text)

    terminal.feed = watch  # type: ignore[method-assign]
    reply = StyledReply(console(terminal), clock=iter(range(10**6)).__next__)
    words = [f"w{number}" for number in range(200)]
    for word in words:
        reply.text(word + " ")
    reply.finish()
    assert 0 < highest < 8
    assert "\n".join(terminal.everything).split() == words


def test_a_live_part_that_shrinks_leaves_nothing_behind() -> None:
    terminal = Terminal(40, 10)
    region = LiveRegion(terminal, lambda: (40, 10))
    region.frame([], ["one", "two", "three"])
    region.frame(["done"], ["one"])
    assert terminal.everything == ["done", "one"]
    region.frame(["one", "last"], [])
    assert terminal.everything == ["done", "one", "last"] and (terminal.x, terminal.y) == (0, 3)


def test_a_terminal_made_narrower_is_redrawn_from_the_right_row() -> None:
    columns = [40]
    terminal = Terminal(40, 10)
    region = LiveRegion(terminal, lambda: (columns[0], 10))
    terminal.feed("earlier\n")
    region.frame([], ["x" * 35, "y" * 35])
    columns[0] = 20  # the terminal wraps both lines: the live part takes four rows now
    narrow = Terminal(20, 10)
    narrow.feed("earlier\n" + "x" * 35 + "\n" + "y" * 35)
    terminal.feed = narrow.feed  # type: ignore[method-assign]
    region.frame([], ["new"])
    assert narrow.everything == ["earlier", "new"]


def test_a_reply_without_text_leaves_no_trace() -> None:
    terminal = Terminal(40, 5)
    reply = StyledReply(console(terminal))
    reply.waiting("reading")
    assert terminal.rows[0] == "reading"
    reply.discard()
    assert terminal.everything == [] and (terminal.x, terminal.y) == (0, 0)


def test_plain_replies_are_the_text_itself() -> None:
    terminal = Terminal()
    reply = PlainReply(terminal, filtered=True)
    for piece in ("a\x1b", "[31mb\r\n", "# c"):
        reply.text(piece)
    reply.finish()
    assert terminal.everything == ["a[31mb", "# c"]
