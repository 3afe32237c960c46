"""Speed with real models: this runtime, its peers, and the command from end to end. No time is judged."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contestants import Fake

import exl_runtime as exl
from eval.commands import speed
from eval.made.folder import Recipe, write_model
from eval.made.shape import Shape
from eval.speed import bandwidth as bandwidth_module
from eval.speed import sprint as sprint_module
from eval.speed.contestant import Ours
from eval.speed.peers import open_peer, split_peer
from eval.speed.workload import Workload, prompts_of
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import EvalError, UsageError

CPU = torch.device("cpu")
TINY = Shape(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocab=2048, context=512)


# --- this runtime ------------------------------------------------------------------------------------------------


def test_ours_does_what_it_times() -> None:
    calls = []

    def timer(work: Callable[[], object]) -> float:
        calls.append(work)
        work()
        return 1.0

    load = Workload(prompt=40, generate=5, batch=2)
    with exl.load("demo", context=load.context, threads=1) as runtime:
        ours = Ours(runtime, timer=timer)
        prompts = prompts_of(load, 3, range(10, 2000))
        assert ours.cold(prompts.cold) == 1.0
        before = runtime.stats
        assert (before.prompt_tokens, before.reused_tokens, before.generated_tokens) == (80, 0, 2)
        ours.turn(prompts.turn)
        after = runtime.stats
        assert after.reused_tokens == 80, "the whole prompt is reused"
        assert ours.decode(prompts.deep, 5, known=True) > 0
        last = runtime.stats
        assert last.generated_tokens - after.generated_tokens == 2 * 6
        assert last.reused_tokens - after.reused_tokens == 2 * 39
        assert len(calls) == 2, "decoding is timed by the result, not around the prompt"
        assert "exl2" in ours.details().values()


def test_ours_refuses_what_does_not_fit() -> None:
    load = Workload(prompt=40, generate=5, batch=500)
    with (
        exl.load("demo", context=load.context, threads=1) as runtime,
        pytest.raises(UsageError, match=r"500 sequences of 73 tokens do not fit the cache"),
    ):
        Ours(runtime).prepare(load, prompts_of(load, 0, [5]))


# --- peers -------------------------------------------------------------------------------------------------------


def test_peers_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    assert split_peer(f"llama.cpp={tmp_path / 'x.gguf'}") == ("llama.cpp", tmp_path / "x.gguf")
    assert split_peer(f"transformers={tmp_path}") == ("transformers", tmp_path)
    for text in ("llama.cpp", "llama.cpp=", "other=x", "llama.cpp=/absent.gguf", "transformers=/absent"):
        with pytest.raises(UsageError, match="--peer"):
            split_peer(text)


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("llama.cpp", "llama_cpp", "--peer llama.cpp needs llama-cpp-python\n  hint: pip install llama-cpp-python"),
        ("transformers", "transformers", "--peer transformers needs transformers\n  hint: pip install transformers"),
        ("exllamav2", "exllamav2", "--peer exllamav2 runs on an NVIDIA GPU only"),
    ],
)
def test_absent_peers_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EvalError) as caught:
        open_peer(name, tmp_path, CPU)
    assert str(caught.value).startswith(message)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "dense"
    write_model(folder, TINY, Recipe(format="bf16"), QuietReporter())
    return folder


def test_transformers_peer_computes_what_it_says(dense: Path) -> None:
    transformers = pytest.importorskip("transformers")
    load = Workload(prompt=20, generate=6, batch=2)
    prompts = prompts_of(load, 0, range(10, 2000))
    peer = open_peer("transformers", dense, CPU)
    peer.prepare(load, prompts_of(load, 1, range(10, 2000)))
    assert min(peer.cold(prompts.cold), peer.turn(prompts.turn)) > 0
    assert peer.decode(prompts.deep, 6, known=True) > 0
    # What went through the cache, cut twice, is what the model says without any cache.
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    for prompt, held in zip(prompts.deep, peer._held, strict=True):
        expected = list(prompt)
        for _ in range(6):
            with torch.inference_mode():
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert list(held) == expected
    peer.close()


def test_transformers_peer_refuses_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(EvalError, match="transformers cannot open it"):
        open_peer("transformers", tmp_path, CPU)


def test_llama_cpp_peer(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from eval.made.twin import write_twin
    from eval.speed.peers.llamacpp import SETTINGS

    write_twin(tmp_path / "twin.gguf", TINY, "Q8_0", 1, QuietReporter())
    load = Workload(prompt=20, generate=6, batch=2)
    prompts = prompts_of(load, 0, range(10, 2000))
    peer = open_peer("llama.cpp", tmp_path / "twin.gguf", CPU)
    peer.set_threads(1)
    peer.prepare(load, prompts_of(load, 1, range(10, 2000)))
    assert set(peer.details()["settings"].values()) <= {str(setting) for setting in SETTINGS}
    peer.cold(prompts.cold)
    peer.turn(prompts.turn)
    peer.decode(prompts.deep, 6, known=True)
    context = peer._context(peer._best["decoding"])
    held = [tuple(ids) for ids in context._held]
    assert [ids[:20] for ids in held] == list(prompts.deep)
    # The same tokens again, without anything cached.
    for count in range(20, 26):
        context.cold([ids[:count] for ids in held])
        assert context._next == [ids[count] for ids in held]
    peer.close()


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_module, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth_module, "llc_bytes", lambda device: 1 << 16)


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    speed.add(parser)
    return parser.parse_args([str(one) for one in given])


SMALL = ("--prompt", 40, "--generate", 4, "--runs", 2)
INTERRUPTED = ("--prompt", 64, "--generate", 32, "--runs", 2, "--threads", "1")


@pytest.mark.usefixtures("quick")
def test_command_on_the_demo() -> None:
    outcome = speed.run(arguments("demo", *SMALL, "--threads", "1,2", "--context-filled", 60), QuietReporter())
    assert outcome.code == 0
    facts = json.loads(outcome.text.splitlines()[-1])
    assert facts == json.loads(json.dumps(outcome.facts))
    assert [heat["threads"] for heat in facts["heats"]] == [1, 2]
    for heat in facts["heats"]:
        for figure in heat["figures"]["exl-runtime"].values():
            assert figure["runs"] == 2
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]
        assert heat["bandwidth_bytes_per_second"]["min"] > 0
        assert heat["share_of_bandwidth"]["median"] > 0
    assert facts["peak_resident_bytes"] >= facts["resident_before_bytes"] > 10 << 20
    assert "decode, tok/s" in outcome.text
    torch.set_num_threads(1)


@pytest.mark.usefixtures("quick")
def test_command_beside_a_peer(dense: Path) -> None:
    pytest.importorskip("transformers")
    given = arguments(dense, *SMALL, "--threads", "1", "--batch", 2, "--peer", f"transformers={dense}")
    outcome = speed.run(given, QuietReporter())
    (heat,) = outcome.facts["heats"]
    assert set(heat["figures"]) == {"exl-runtime", "transformers"}
    assert heat["times_as_fast_as"]["transformers"]["decode"]["runs"] == 2
    assert "x transformers" in outcome.text
    assert outcome.facts["contestants"]["transformers"]["dtype"] == "bfloat16"


@pytest.mark.usefixtures("quick")
def test_command_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(sprint_module, "Ours", lambda runtime: Fake("exl-runtime", log, stop_at="exl-runtime decode"))
    outcome = speed.run(arguments("demo", *INTERRUPTED), QuietReporter())
    assert outcome.code == 130
    assert "PARTIAL" in outcome.text
    log.clear()
    monkeypatch.setattr(sprint_module, "Ours", lambda runtime: Fake("exl-runtime", log, stop_at="exl-runtime warm 1"))
    with pytest.raises(KeyboardInterrupt):  # the second warm-up, before anything was measured
        speed.run(arguments("demo", *INTERRUPTED), Warm(log))


class Warm(QuietReporter):
    """Makes both warm-ups look alike: with threads set."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        log.append("exl-runtime warm 1")


def test_command_refuses(dense: Path) -> None:
    with pytest.raises(UsageError, match="takes 1129 tokens of context, the model has 1024"):
        speed.run(arguments("demo", "--prompt", 1000), QuietReporter())
    twice = ("--peer", f"transformers={dense}", "--peer", f"transformers={dense}")
    with pytest.raises(UsageError, match="the same peer twice"):
        speed.run(arguments("demo", *twice), QuietReporter())
    with pytest.raises(SystemExit):
        arguments("demo", "--threads", "1,0")


def test_a_text_seen_before_is_not_guessed() -> None:
    load = Workload(prompt=40, generate=24, runs=1)
    with exl.load("demo", threads=1, context=256) as runtime:
        ours = Ours(runtime)
        prompts = prompts_of(load, 0, list(range(300, 400)))
        for _ in range(2):
            ours.decode(prompts.deep, load.generate, known=False)
        assert runtime.stats.generated_tokens > 2 * load.generate and runtime.stats.drafted_tokens == 0
