"""Every example runs, and so does the Python in README.md."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import exl_runtime as exl

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {  # what greedy answers of the demo model must contain
    "hello": "Paris",
    "batch": "Rome",
    "logprobs": "log-probability of the text: -",
    "chat_session": "Mira",
    "streaming": "tokens/s]",
    "async_clients": "second: ",
    "lm_eval_adapter": "log-likelihood: (-",
    "speculative": "free, drawn: ",
    "json_extraction": "as an object: {'country': 'France', 'capital': ",
    "lora": "by default: ",
    "retrieval": "answer: Your name is Mira.",
    "samples": "the third once more: True",
    "server_client": "streamed: The capital of Norway is Oslo.",
}


SERVERS = {"web_chat", "tk_chat"}  # they run until they are stopped; tests/server/test_web_chat.py does, and below


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in SERVERS], ids=lambda path: path.stem)
def test_example(path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out


class FakeTk:
    """As much of tkinter as the example uses, without a display: a root that is also every part of the window."""

    def __init__(self, *_: object, **options: object) -> None:
        self.options, self.written, self.later = options, "", []

    def insert(self, where: str, text: str) -> None:
        self.written += text

    def get(self) -> str:
        return self.written

    def delete(self, first: object, last: object) -> None:
        self.written = ""

    def after(self, milliseconds: int, call: Callable[[], None]) -> None:
        self.later.append(call)

    def nothing(self, *_: object, **options: object) -> None:
        pass

    pack = bind = see = nothing


def test_the_window_shows_replies(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tkinter", None)  # importable where there is no Tk
    example = runpy.run_path(str(ROOT / "examples" / "tk_chat.py"))
    root = FakeTk()
    with exl.load("demo", threads=1) as rt:
        parts = SimpleNamespace(Text=FakeTk, Entry=FakeTk, Button=FakeTk)
        window = example["ChatWindow"](parts, root, rt.chat())
        window.entry.insert("end", "What is the capital of France?")
        window.send()
        window.entry.insert("end", "not now: a reply is on its way")
        window.send()
        window.thread.join(60)
        root.later.pop()()
        assert window.log.written.startswith("> What is the capital of France?\n") and "Paris" in window.log.written
        assert window.entry.written and len(root.later) == 1, "it looks again"
        window.entry.written = ""
        monkeypatch.setattr(window.chat, "stream", lambda text: (_ for _ in ()).throw(exl.errors.CacheFull("no page")))
        window.entry.insert("end", "and now?")
        window.send()
        window.thread.join(60)
        root.later.pop()()
        assert window.log.written.endswith("> and now?\n[no page]\n\n")
        assert window.stop.options["command"] == window.chat.cancel


def test_every_example_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES if f"examples/{path.name}" not in text]


def test_the_python_of_the_readme_runs(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block.replace("path/to/model", "demo"), "README.md", "exec"), {})
    assert "RuntimeStats" in capsys.readouterr().out
