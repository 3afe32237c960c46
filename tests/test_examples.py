"""Every example runs, and so does the Python in README.md."""

import re
import runpy
import sys
from pathlib import Path

import pytest

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
    "server_client": "streamed: The capital of Norway is Oslo.",
}


SERVERS = {"web_chat"}  # they run until they are stopped; tests/server/test_web_chat.py does


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in SERVERS], ids=lambda path: path.stem)
def test_example(path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out


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
