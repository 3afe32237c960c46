"""/lora in the chat and --lora on the command line, on the demo model."""

import json
from pathlib import Path

import pytest
from adapters import shapes_of, write_adapter
from talking import Recorder, Typist

import exl_runtime as exl
from exl_runtime.chat import repl
from exl_runtime.chat.session import ChatSession
from exl_runtime.cli import main
from exl_runtime.cli.options import lora


@pytest.fixture(scope="module")
def rt():
    with exl.load("demo", context=300, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(rt, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "tale", shapes_of(rt._engine().model))


def test_lora_is_loaded_weighed_turned_off_and_freed(rt, folder) -> None:
    def talk(*lines: str) -> Recorder:
        screen = Recorder()
        repl.run(ChatSession(rt), screen, Typist(*lines))
        return screen

    assert "no adapter is loaded" in talk("/lora").said("notice")
    screen = talk(f"/lora {folder} 0.5")
    assert "tale" in screen.said("table") and "weight 0.5" in screen.said("table")
    assert [(info.name, info.weight) for info in rt.loras] == [("tale", 0.5)]
    talk("/lora tale=-2")
    assert rt.loras[0].weight == -2
    assert "off" in talk("/lora none").said("table") and rt.loras[0].weight == 0
    talk("/lora tale")
    assert rt.loras[0].weight == 1
    assert talk("/lora 3", "/lora drop x", "/lora nowhere", "/lora tale 1e9").said("error").count("hint") == 4
    talk("/lora drop tale")
    assert rt.loras == ()


def test_an_option_says_folder_and_weight() -> None:
    assert lora("a/b") == ("a/b", 1.0) and lora("a/b=0.5") == ("a/b", 0.5) and lora("a=b") == ("a=b", 1.0)
    assert lora("a=b=-1") == ("a=b", -1.0) and lora("=2") == ("=2", 1.0)


def test_the_command_line_adapts_and_names_mistakes(folder, capsys) -> None:
    def run(*options: str) -> tuple[int, str, str]:
        words = ["run", "demo", "--threads", "1", "--json", "--raw", "-p", "Once upon", "-n", "12", "-t", "0", *options]
        code = main.guarded(main.main, words)
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1])["text"] if code == 0 else "", err

    plain, adapted = run(), run("--lora", f"{folder}=0.9", "--step-tokens", "32")
    assert plain[0] == adapted[0] == 0 and plain[1] != adapted[1]
    code, _, err = run("--lora", "nowhere")
    assert code == 2 and "no folder nowhere" in err
