"""Whole sessions in tmux, every command at least once, and what then stands on the screen."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from tmuxing import Tmux, chat_command

from exl_runtime.chat.commands import COMMANDS

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
BLOCKS = "<think>\nIs it two?\n</think>\n\nSecond:\n\n```python\nx = 1\n```\n\n```\ny\n```"
REPLIES = ["The **first** reply.", BLOCKS, "Third one.", "Fourth."]
SECOND = "assistant: Second: ```python x = 1 ``` ``` y ```"


def run(terminal: Tmux, steps: tuple[tuple[str, str, list[str] | None], ...]) -> None:
    """(what is typed, what appears, all that stands below it) one after another; None: whatever stands there."""
    for line, seen, wanted in steps:
        rows = terminal.say(line, seen)
        assert wanted is None or rows == wanted, line


def test_messages_and_branches(repo: Path, tmp_path: Path) -> None:
    with Tmux(repo, tmp_path, chat_command(REPLIES)) as terminal:
        terminal.wait("Ctrl-D quits")
        first = ["The first reply.", "prompt 23 tok 46 t/s · gen 20 tok 9.5 t/s · ctx [--------] 43/4k"]
        run(
            terminal,
            (
                ("hello", "gen 20", first),
                ("more", "gen 68", None),
                ("/think", "two", ["Is it two?"]),
                (
                    "/regen",
                    "reply 2",
                    [
                        "Third one.",
                        "prompt 66 tok (66 cached) · gen 10 tok 4.5 t/s · ctx [--------] 76/4k",
                        "reply 2 of 2: /goto prev and /goto next turn the pages",
                    ],
                ),
                (
                    "/turns",
                    "1    user",
                    [
                        "0    user                   hello",
                        "     assistant              The **first** reply.",
                        "1    user                   more",
                        "     assistant    2 of 2    Third one.",
                    ],
                ),
                (
                    "/branches",
                    "2*",
                    [
                        "1         2 messages                               Second: ```python x = 1 ``` ``` y ```",
                        "2*        2 messages, another reply to number 1    Third one.",
                    ],
                ),
                ("/goto prev", "1 of 2", ["1 of 2", "user: more", SECOND]),
                (
                    "/branch 1",
                    "begins",
                    ["what you say next begins a branch beside “more” (/branches lists them)"],
                ),
                (
                    "/edit 0 other",
                    "gen 7",
                    ["Fourth.", "prompt 23 tok (6 cached) 34 t/s · gen 7 tok 3.0 t/s · ctx [--------] 30/4k"],
                ),
                ("/branch talk", "called", ["this branch is called talk"]),
                (
                    "/branches",
                    "talk",
                    [
                        "1             2 messages                             Second: ```python x = 1 ``` ``` y ```",
                        "2             2 messages, another reply to number    Third one.",
                        "              1",
                        "3*    talk    1 message, its own from number 0       Fourth.",
                    ],
                ),
                ("/goto 1", "branch 1", ["branch 1", "user: more", SECOND]),
                ("/goto talk", "branch 3", ["branch 3 (talk)", "user: other", "assistant: Fourth."]),
                ("/edit reply 0 My own", "changed", None),
                (
                    "/continue",
                    "gen 7",
                    ["Fourth.", "prompt 29 tok (23 cached) 12 t/s · gen 7 tok 3.0 t/s · ctx [--------] 36/4k"],
                ),
                ("/undo", "taken back", ["taken back: other (/branches lists what was said)"]),
                ("/goto talk", "branch 3", ["branch 3 (talk)", "user: other", "assistant: Fourth."]),
                ("/delete 0", "gone", ["gone for good, with all that followed: other"]),
                ("/branches", "2 ", None),
                (
                    "/brunch",
                    "did you mean",
                    [
                        "there is no command /brunch",
                        "  hint: did you mean /branch? (a message that starts with a slash is written with two: //)",
                    ],
                ),
                ("/clear", "new conversation", ["a new conversation; system prompt and settings stay"]),
                ("//help is a command", "gen 7", None),
                ("/turns", "0    user", ["0    user             /help is a command", "     assistant        Fourth."]),
                ("/help undo", "go back", ["/undo", "  go back to before the last message; it stays as a branch"]),
            ),
        )


def test_what_the_model_reads_and_how_it_chooses(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("my notes")
    with Tmux(repo, tmp_path, chat_command(REPLIES)) as terminal:
        terminal.wait("Ctrl-D quits")
        run(
            terminal,
            (
                ("/system Be brief.", "set", ["system prompt set; it holds from now on"]),
                ("/system", "Be brief.", ["Be brief."]),
                ("/system none", "removed", ["system prompt removed"]),
                ("/file notes.txt", "goes with", ["notes.txt (8 tokens) goes with your next message"]),
                ("/file none", "nothing", ["nothing is attached any more"]),
                ("hello", "gen 20", None),
                (
                    "/template",
                    "enable_thinking",
                    [
                        "<user>hello",
                        "<assistant>The **first** reply.",
                        "",
                        "44 tokens:",
                        "60 117 115 101 114 62 104 101 108 108 111 10 60 97 115 115 105 115 116 97 110 116 62 84 10",
                        "4 101 32 42 42 102 105 114 115 116 42 42 32 114 101 112 108 121 46 10",
                        "variables of the template (/set changes them)",
                        "template.enable_thinking    not set",
                    ],
                ),
                ("/tokens ab", "2 tokens", ["2 tokens", "97    a", "98    b"]),
                ("/set temp 0.5", "0.5", ["temperature = 0.5"]),
                ("/set stop_loop 8 3", "8 3", ["stop_loop = 8 3"]),
                ("/set template.enable_thinking off", "false", ["template.enable_thinking = false"]),
                ("/set template.bos_token x", "cannot", None),
                ("/set template.enable_thinking default", "not set", None),
                ("/set guidance 1.5", "1.5", None),
                ('/set negative "Be rude."', "rude", ["negative = Be rude."]),
                ("/set guidance 1", "= 1", None),
                ("/preset greedy", "preset", ["preset greedy; /sampler shows what it does, /set changes it"]),
                ("/sampler", "steps", ["steps, in this order", "1    take the best token (greedy)"]),
                ("/preset save mine", "kept", ["the sampling settings are kept as preset mine"]),
                ("/preset delete mine", "gone", ["preset mine is gone"]),
                ("/seed 7", "seed", ["seed = 7"]),
                ("/ban a Paris", "never", ["never in a reply", "97      a", "text    Paris"]),
                ("/ban none", "nothing", ["nothing is banned"]),
                ("/bias b=2", "+2", ["98    b    +2"]),
                ("/set thoughts show", "show", ["thoughts = show"]),
                (
                    "more",
                    "gen 68",
                    [
                        *("Is it two?", "", "Second:", "", "", " x = 1", "", "", "", " y", ""),
                        "prompt 66 tok (43 cached) 46 t/s · gen 68 tok 34 t/s · ctx [--------] 134/4k",
                    ],
                ),
                ("/probs 1", "over 68 tokens", None),
                ("/ppl", "over 68 tokens", None),
            ),
        )


def test_grammars(repo: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    with Tmux(repo, tmp_path, chat_command(REPLIES)) as terminal:
        terminal.wait("Ctrl-D quits")
        run(
            terminal,
            (
                (
                    '/json {"type": "object"}',
                    "under",
                    ['replies have to be JSON under: {"type": "object"} (/grammar none)'],
                ),
                (
                    "/grammar choice yes no",
                    "one of",
                    ['replies have to be one of: ["yes", "no"] (/grammar none)'],
                ),
                ("/grammar none", "anything", ["replies may look like anything"]),
            ),
        )


def test_conversations_as_files(repo: Path, tmp_path: Path) -> None:
    with Tmux(repo, tmp_path, chat_command(REPLIES)) as terminal:
        terminal.wait("Ctrl-D quits")
        steps = (
            ("hello", "gen 20", None),
            ("more", "gen 68", None),
            (
                "/search reply",
                "found",
                [
                    "1    The **first** reply.    assistant",
                    "1 found; /load N opens the conversation with that number",
                ],
            ),
            ("/export md talk.md", "wrote", ["wrote 4 messages to talk.md"]),
            ("/export json talk.out", "wrote", ["wrote 4 messages to talk.out"]),
            ("/export html talk.html", "wrote", ["wrote 4 messages to talk.html"]),
            ("/kv save", "wrote", None),
            ("/save talk.json", "saved", ["saved 4 messages to talk.json"]),
            (
                "/load talk.json",
                "loaded",
                [
                    "loaded 4 messages, with their system prompt and settings, from talk.json",
                    "user: more",
                    SECOND,
                ],
            ),
        )
        run(terminal, steps)
        rows = terminal.say("/list", "hello")
        assert re.fullmatch(r"1    hello    \d{4}-\d\d-\d\d \d\d:\d\d, 2 messages, fake-model", rows[0])
        assert rows[1:] == ["/load N goes on with one; /search WORDS looks into all of them"]
        terminal.say("/load 1", "loaded 4")
        assert terminal.say("/list", "hello")[0].startswith("1*    hello")
        terminal.type("/exit")
        terminal.keys("Enter")
    assert "> Is it two?\n\nSecond:" in (tmp_path / "talk.md").read_text()
    assert json.loads((tmp_path / "talk.out").read_text())["messages"][3]["reasoning_content"] == "Is it two?"
    assert "<summary>Thoughts</summary>" in (tmp_path / "talk.html").read_text()
    assert list(tmp_path.glob("exl-runtime/chats/*.json.kv"))
    with Tmux(repo, tmp_path, chat_command(REPLIES, "--resume")) as terminal:
        rows = terminal.wait("Ctrl-D quits")
        assert rows[-3:-1] == ["user: more", SECOND]
        assert any(row.startswith("loaded 4 messages") for row in rows)


def test_the_clipboard_of_the_terminal(repo: Path, tmp_path: Path) -> None:
    with Tmux(repo, tmp_path, chat_command(REPLIES[1:])) as terminal:
        terminal.run("set-option", "-s", "set-clipboard", "on")
        terminal.wait("Ctrl-D quits")
        terminal.say("hello", "gen 68")
        for line, said, copied in (
            ("/copy", "copied the reply", "Second:\n\n```python\nx = 1\n```\n\n```\ny\n```"),
            ("/copy 2", "copied code block 2", "y"),
        ):
            terminal.say(line, said)
            assert terminal.run("show-buffer") == copied
        assert terminal.say("/copy 3", "hint") == ["there is no code block 3", "  hint: the last reply has 2"]


def test_a_context_that_fills(repo: Path, tmp_path: Path) -> None:
    with Tmux(repo, tmp_path, chat_command(["Yes, I do remember that."], context=230)) as terminal:
        terminal.wait("Ctrl-D quits")
        full = "the context is 91% full: soon the oldest turns will leave (/clear starts afresh)"
        gauges = ("[##------] 69/230", "[#####---] 139/230", "[#######-] 209/230", "[#######-] 209/230")
        for number, gauge in enumerate(gauges):
            rows = terminal.say(f"fact number {number} is a long one", "gen 24")
            assert any(row.endswith(f"ctx {gauge}") for row in rows) and (full in rows) == (number > 1)
        assert rows[1:3] == [
            "the context is full: the model no longer sees this message and its reply: “fact number 0",
            "is a long one” (70 tokens)",
        ]
        assert terminal.say("/turns", "fact number 0")[0:3] == [
            "0    user         no longer seen by the model    fact number 0 is a long one",
            "     assistant    no longer seen by the model    Yes, I do remember that.",
            "1    user                                        fact number 1 is a long one",
        ]


def test_a_reply_that_is_stopped_and_one_that_is_killed(repo: Path, tmp_path: Path) -> None:
    command = chat_command(["word " * 60, "Rest.", "last " * 60], delay=0.02)
    with Tmux(repo, tmp_path, command) as terminal:
        terminal.wait("Ctrl-D quits")
        terminal.type("hello")
        terminal.keys("Enter")
        terminal.wait("word word", prompt=False)
        terminal.keys("C-c")
        rows = " ".join(terminal.wait("stopped by you"))
        made = int(re.search(r"gen (\d+) tok", rows)[1])
        rows = terminal.say("/continue", "gen 5")
        assert rows[0] == "Rest." and f"prompt {23 + made} tok ({23 + made} cached)" in rows[1], "its tokens are kept"
        terminal.type("again")
        terminal.keys("Enter")
        terminal.wait("last last", prompt=False)
        rows = terminal.kill()
        shown = " ".join(row for row in rows if row.startswith("last")).strip()
    with Tmux(repo, tmp_path, chat_command(["Rest."], "--resume")) as terminal:
        rows = terminal.wait("/continue goes on with it")
        reply = next(row for row in rows if row.startswith("assistant: last")).removeprefix("assistant: ")
        assert reply.startswith(shown[:100]) or shown.startswith(reply.rstrip("…")), "nothing that was shown is lost"
        assert terminal.say("/continue", "gen 5")[0] == "Rest."


def test_the_editor_of_the_user(repo: Path, tmp_path: Path) -> None:
    script = tmp_path / "edit.sh"
    script.write_text('#!/bin/sh\nprintf "%s by hand" "$(cat "$1")" > "$1"\n')
    script.chmod(0o700)
    with Tmux(repo, tmp_path, chat_command(REPLIES), EDITOR=str(script)) as terminal:
        terminal.wait("Ctrl-D quits")
        rows = terminal.say("/editor written", "gen 20")
        assert rows[0] == "written by hand" and rows[1] == "The first reply."


def test_the_input_line(repo: Path, tmp_path: Path) -> None:
    with Tmux(repo, tmp_path, chat_command(["Yes."])) as terminal:
        terminal.wait("Ctrl-D quits")
        terminal.say("a first message", "gen 4")
        terminal.say("second one", "gen 4")
        terminal.keys("C-l")
        terminal.wait("")
        terminal.keys("C-r")  # searches what was typed before
        terminal.type("first")
        terminal.wait("> a first message", prompt=False)
        terminal.keys("Enter")  # takes what was found
        time.sleep(0.3)
        terminal.keys("Enter")
        terminal.wait("gen 4")
        assert [row.split()[-1] for row in terminal.say("/turns", "2    user")][4] == "message"
        terminal.keys("C-l")
        terminal.type("/tem")
        terminal.wait("the exact prompt", prompt=False)  # what the command does, in the menu
        terminal.keys("Tab")
        terminal.wait("> /template", prompt=False)
        terminal.keys("Enter")
        time.sleep(0.3)
        terminal.keys("Enter")
        terminal.wait("tokens:")
        terminal.keys("C-l")
        terminal.type("/set min")
        rows = terminal.wait("min_tokens", prompt=False)
        assert any("min_p" in row for row in rows)
        terminal.keys("C-c")
        terminal.run("set-buffer", "pasted\nin two lines")
        terminal.wait("> ")
        terminal.run("paste-buffer", "-p")  # bracketed: its line end sends nothing
        terminal.wait("in two lines", prompt=False)
        terminal.type(" and a third")
        terminal.keys("M-Enter")
        terminal.type("done")
        terminal.keys("Enter")
        terminal.wait("gen 4")
        terminal.type('"""')
        terminal.keys("Enter")
        terminal.type("between quotes")
        terminal.keys("Enter")
        terminal.type('"""')
        terminal.keys("Enter")
        terminal.wait("gen 4")
        rows = terminal.say("/turns", "4    user")
        assert [row.split("    ")[-1].strip() for row in rows[-4::2]] == [
            "pasted in two lines and a third done",
            "between quotes",
        ]


def test_the_demo_its_memory_and_another_model(repo: Path, tmp_path: Path) -> None:
    options = ["demo", "--threads", "1", "--context", "512", "-t", "0", "--no-keep"]
    with Tmux(repo, tmp_path, [sys.executable, "-m", "exl_runtime", "chat", *options], rows=40) as terminal:
        terminal.wait("Ctrl-D quits", seconds=180)
        assert "Oslo" in terminal.say("What is the capital of Norway?", "gen ")[0]
        assert "What is the capital of Norway?" in "".join(terminal.say("/template", "tokens:")[:3])
        rows = terminal.say("/probs 1", "perplexity")
        assert rows[0] == "token, its probability, what else was likely" and rows[-1].startswith("perplexity 1.")
        assert all("%" in row for row in rows[1:-1]) and len(rows) > 5
        assert terminal.say("/lora", "adapter") == ["no adapter is loaded: /lora FOLDER [WEIGHT]"]
        before = _memory(terminal.say("/mem", "this program"))
        rows = terminal.say("/model demo", "loaded in")
        assert rows[0] == "closing demo, opening demo …"
        assert _memory(terminal.say("/mem", "this program")) < before + 16, "the first one is gone"
        assert any(row.startswith("requests") for row in terminal.say("/stats", "requests"))
        assert any("Oslo" in row for row in terminal.say("/regen", "reply 2")), "the conversation went along"
        assert terminal.say("/set speed 9", "hint")[0] == "there is no setting 'speed'"
        terminal.type("/quit")
        terminal.keys("Enter")


def _memory(rows: list[str]) -> float:
    """MiB of the program."""
    number, unit = next(row for row in rows if row.startswith("this program")).split()[2:]
    return float(number) * (1024 if unit == "GiB" else 1)


def test_no_command_is_left_out() -> None:
    typed = set(re.findall(r'"/([a-z]+)', Path(__file__).read_text().replace("'/", '"/')))
    assert {command.name for command in COMMANDS} - {"exit"} <= typed
