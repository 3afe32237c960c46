"""A model with windows as `load` opens it: less memory, the same text, and `exl info` says so. The demo plays along: a
window in its config changes what its layers see, not what its files hold."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import exl_runtime as exl
from exl_runtime.cache.types import FP32
from exl_runtime.cli.main import main
from exl_runtime.config.archs import ARCHS
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.model.placement import auto_context
from exl_runtime.model.summary import summarize

GREEDY = exl.SamplingParams(temperature=0)
WINDOW, CONTEXT = 200, 2048
KINDS = {"all": {}, "some": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    name = "MistralForCausalLM"
    there = tmp_path_factory.mktemp("windowed") / request.param
    shutil.copytree(demo, there)
    config = json.loads((there / "config.json").read_text())
    config |= {"architectures": [name], "model_type": "mistral", "sliding_window": WINDOW}
    config |= {"max_position_embeddings": CONTEXT, **KINDS[request.param]}
    (there / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:  # no family has the shape of the demo and layers of two types
        patch.setitem(ARCHS, name, replace(ARCHS[name], typed=request.param == "some"))
        yield there


def talk(rt: exl.Runtime) -> list[object]:
    """Long turns, the first again, and two at once."""
    story = "Once upon a time there was a fox who lived by the sea. " * 30
    said = [{"role": "user", "content": story}]
    seen: list[object] = []
    for number in range(4):
        result = rt.generate(said, max_tokens=40, sampling=GREEDY, stop_ids=frozenset())
        seen += [result.text, result.prompt_tokens - result.reused_tokens]
        said += [{"role": "assistant", "content": result.text}, {"role": "user", "content": story[: 200 + number]}]
    texts = [story[:900], story[:901]]
    seen += [result.text for result in rt.generate(texts, max_tokens=50, sampling=GREEDY)]
    return seen


def test_the_same_text_in_less_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with exl.load(folder, context=CONTEXT, threads=1) as rt:
        few, least = talk(rt), rt.info.cache_bytes
        assert rt.stats.pages_held == 0
        assert rt._generator is not None and rt.stats.pages_total == sum(rt._generator.kv.counts)
    loading = import_module("exl_runtime.runtime.load")
    original = loading.geometry_of
    monkeypatch.setattr(loading, "geometry_of", lambda spec, cache, context=None: original(spec, cache))
    with exl.load(folder, context=CONTEXT, threads=1) as rt:
        assert talk(rt) == few
        assert rt.info.cache_bytes > least


@pytest.mark.parametrize("draft", ["same", "without"])
def test_a_draft_model_beside_it(folder: Path, demo: Path, draft: str) -> None:
    """One that keeps as little, and one whose layers see all: then both keep all."""
    with exl.load(folder, context=CONTEXT, threads=1) as rt:
        alone = talk(rt)
    beside = folder if draft == "same" else demo
    with exl.load(folder, context=CONTEXT, threads=1, draft=beside, speculate="draft") as rt:
        assert [text for text in talk(rt) if isinstance(text, str)] == [text for text in alone if isinstance(text, str)]
        assert rt.stats.accepted_tokens > 0


def test_info_counts_a_window_by_what_it_sees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, short = summarize(folder, CONTEXT), summarize(folder, 256)
    layers = 4 if folder.name == "some" else 6
    page = 256 * 2 * 4 * 32 * 4  # of one layer
    held = (WINDOW + 512 - 3) // 256 + 2 + 1  # and one for a copy
    assert long.windows == ((layers, WINDOW),) and short.windows == ()
    assert long.cache_bytes == page * ((6 - layers) * 9 + layers * held)
    assert short.cache_bytes == page * 6 * 2
    assert main(["info", str(folder), "--device", "cpu", "--context", str(CONTEXT)]) == 0
    assert f"{layers} of 6 layers see the last {WINDOW} tokens" in " ".join(capsys.readouterr().out.split())
    with exl.load(folder, context=CONTEXT, device="cpu", threads=1) as rt:
        assert long.load_cache_bytes == rt.info.cache_bytes


def test_a_longer_context_fits_into_the_same_memory(folder: Path, demo: Path) -> None:
    longest = []
    for path in (folder, demo):
        files = load_config(path)
        spec = replace(resolve(files.config, files.generation), context_length=1 << 20)
        longest.append(auto_context(spec, cache=FP32, device=torch.device("cpu"), free=120 << 20))
    assert longest[0] > longest[1] * (2 if folder.name == "some" else 20)


def test_a_conversation_comes_back_from_its_file(folder: Path, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Tell me of the sea. " * 150}]
    path = tmp_path / "talk.kv"
    with exl.load(folder, context=CONTEXT, threads=1) as rt:
        reply = rt.generate(said, max_tokens=30, sampling=GREEDY).text
        said += [{"role": "assistant", "content": reply}]
        with rt.held_kv(said) as held:
            path.write_bytes(b"".join(bytes(piece) for piece in held.pieces))
            assert held.tokens > 600
        said += [{"role": "user", "content": "And then?"}]
        wanted = rt.generate(said, max_tokens=30, sampling=GREEDY)
    with exl.load(folder, context=CONTEXT, threads=1) as rt:
        rt.open_kv(path)
        again = rt.generate(said, max_tokens=30, sampling=GREEDY)
        assert again.text == wanted.text and again.reused_tokens >= held.tokens - 1
