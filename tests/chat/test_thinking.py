"""What a model thinks is shown, folded or hidden on the screen, and kept in the conversation; models to complete."""

from types import SimpleNamespace

import pytest
from fake_runtime import FakeRuntime, Info
from prompt_toolkit.document import Document
from talking import Recorder, Typist

from exl_runtime.chat import memory, repl, status
from exl_runtime.chat.editor import CommandCompleter
from exl_runtime.chat.session import ChatSession

REPLY = "<think>\nLet me see, <b> what is it?\n</think>\n\nIt is <b>four</b>."
ANSWER = "It is <b>four</b>.\n"


def talk(*lines: str, replies: tuple[str, ...] = (REPLY,), source: str = "<think>", opens: bool = False):
    screen, runtime = Recorder(), FakeRuntime(list(replies))
    runtime.template = SimpleNamespace(sources={"default": source})
    if opens:
        render = runtime.render
        runtime.render = lambda m, **o: SimpleNamespace(text=render(m, **o).text + "<think>\n", ids=render(m, **o).ids)
    session = ChatSession(runtime)
    repl.run(session, screen, Typist(*lines))
    return session, screen


def test_thoughts_are_folded_shown_or_hidden_and_kept_anyway() -> None:
    session, screen = talk("a")
    assert screen.text == ANSWER and "thought for 7 words" in screen.said("notice")
    assert session.turns[-1].content == REPLY
    _, screen = talk("/think hide", "a")
    assert screen.text == ANSWER and "thought for" not in screen.said("notice")
    _, screen = talk("/think show", "a")
    assert screen.text == REPLY + "\n" and "thought for" not in screen.said("notice")
    _, screen = talk("/think", "/think loud")
    assert "folded" in screen.said("notice") and "show, fold, hide" in screen.said("error")


def test_a_prompt_that_opens_the_thoughts_and_a_reply_that_never_closes_them() -> None:
    _, screen = talk("a", replies=("so it is four</think>Four.",), opens=True)
    assert screen.text == "Four.\n" and "thought for 4 words" in screen.said("notice")
    _, screen = talk("a", "/set max_tokens 5", replies=("only thoughts",), opens=True)
    assert screen.text == "" and "thought for 2 words" in screen.said("notice")
    assert "stopped" not in screen.said("notice")


def test_a_reply_that_goes_on_is_in_the_middle_of_its_answer() -> None:
    session, screen = talk("/set max_tokens 4", "a", "/continue", replies=("abcdefgh", "efgh"), opens=True)
    assert "efgh" in screen.text and "abcd" not in screen.text
    assert session.turns[-1].content == "abcdefgh"


def test_models_without_thoughts_are_shown_as_they_are() -> None:
    _, screen = talk("a", source="no marks here")
    assert screen.text == REPLY + "\n"


@pytest.mark.parametrize("cut", range(1, 9))
def test_pieces_do_not_matter(cut) -> None:
    from exl_runtime.chat.thinking import Thoughts
    from exl_runtime.tokenizer.reasoning import KNOWN, ReasoningSplitter

    thoughts = Thoughts(ReasoningSplitter(KNOWN[0], inside=False))
    shown = "".join(thoughts.push(REPLY[i : i + cut]) for i in range(0, len(REPLY), cut)) + thoughts.finish()
    assert shown == ANSWER.strip() and thoughts.words == 7 and not thoughts.thinking


def test_the_start_line_names_attention_and_free_memory() -> None:
    assert "free" not in status.start_line(Info()) and "attention" not in status.start_line(Info())
    assert "2.0 GiB free" in status.start_line(Info(), 2 * 2**30)
    info = SimpleNamespace(**{name: getattr(Info(), name) for name in Info.__dataclass_fields__}, attention="flash")
    assert "attention flash" in status.start_line(info)


def test_models_beside_the_open_one_are_completed(tmp_path) -> None:
    for name in ("alpha", "beta", "none"):
        (tmp_path / name).mkdir()
    for name in ("alpha", "beta"):
        (tmp_path / name / "config.json").write_text("{}")
    models = memory.models_beside(str(tmp_path / "alpha"))
    assert models == ["demo", str(tmp_path / "beta")]
    completer = CommandCompleter(lambda: models)

    def completions(text: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(text, len(text)), None)]

    assert completions("/model de")[0] == "demo"
    assert str(tmp_path / "beta") in completions(f"/model {tmp_path}/b")
    assert completions("/think f") == ["fold"]
    assert memory.models_beside("/nowhere/at all") == ["demo"]
