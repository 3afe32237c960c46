"""`eval hardware` against a card that exists on paper only: which stages run, what is kept, which targets are met."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval.cli import build_parser
from eval.commands import hardware as command
from eval.hardware import running
from eval.hardware.report import markdown
from eval.hardware.running import Ran, Result, run_process, run_stage
from eval.hardware.stages import Stage, stages
from eval.hardware.targets import Card, rows_of
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import BackendUnavailable, UsageError
from exl_runtime.ops import native

CARD = Card(name="Paper 9000", capability=(8, 9), memory=24 << 30, torch="2.13.0", cores=8)


def speed(rate: float, share: float = 0.9, batch: int = 1, **times: dict[str, float]) -> dict[str, object]:
    figures = {"decode_tokens_per_second": {"median": rate}, "prefill_tokens_per_second": {"median": 5000.0}}
    heat = {
        "share_of_bandwidth": {"median": share},
        "bandwidth_bytes_per_second": {"median": 1e12},
        "figures": {"exl-runtime": figures},
        "times_as_fast_as": {name: {key: {"median": x} for key, x in of.items()} for name, of in times.items()},
    }
    return {"batch": batch, "bytes_per_step": 4e9, "heats": [heat]}


def operation(
    name: str, stored: str, m: int, seconds: float, floor: float, **torch_seconds: float
) -> dict[str, object]:
    return {
        "name": name,
        "stored": stored,
        "m": m,
        "bytes": 1e6,
        "seconds": {"median": seconds},
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "torch_seconds": {key: {"median": value} for key, value in torch_seconds.items()},
        "times_as_fast_as_torch": {key: {"median": value / seconds} for key, value in torch_seconds.items()},
    }


STEP = {"device_step": {"fixed": 0.2e-3, "empty": 5e-6, "recorded": 1e-3, "eager": 3e-3, "products": 0.8e-3}}
GIVEN: dict[str, dict[str, object]] = {
    "step-small": STEP,
    "step-large": STEP,
    "speed-small": speed(400),
    "speed-small-exllamav2": speed(400, exllamav2={"decode": 1.6}),
    "prefill": speed(100, transformers={"prefill": 0.85}),
    "speed-large": speed(220, 0.89),
    "speed-large-8": speed(1500, 0.8, 8),
    "kernels": {
        "operations": [
            operation("q,k,v,o 4096x4096", "exl2 4", 64, 20e-6, 9e-6, dequantized=90e-6, fp16=30e-6),
            operation("down 11008x4096", "exl2 4", 64, 40e-6, 25e-6, dequantized=170e-6, fp16=60e-6),
            operation("head 4096x32000", "exl2 6", 64, 1.0, 0.1, dequantized=1.0),
            operation("down 11008x4096", "gptq 4", 64, 1.0, 0.1, dequantized=1.0),
            operation("down 11008x4096", "exl2 4", 1, 1.0, 0.1, dequantized=1.0),
        ]
    },
    "attention": {
        "operations": [
            operation("attention over 2048", "q4", 1, 9e-6, 3e-6),
            operation("attention over 32768", "q8", 1, 9e-6, 3e-6),
            operation("attention over 32768", "q4", 1, 12e-6, 10e-6),
        ]
    },
}


class Paper:
    """A `Run` that answers from GIVEN, and notes what it was asked."""

    def __init__(self, **instead: Ran) -> None:
        self.asked: list[str] = []
        self.instead = instead

    def __call__(self, stage: Stage, limit: float) -> Ran:
        self.asked.append(stage.name)
        if (ran := self.instead.get(stage.name.replace("-", "_"))) is not None:
            return ran
        if stage.gives == "tests":
            return Ran(0, "....\n12 passed, 2 skipped, 3 deselected in 4.2s\n", 4.2)
        if stage.gives == "time":
            return Ran(0, "", 61.0)
        facts = {"event": "done", **GIVEN.get(stage.name, {})}
        return Ran(0, '{"event": "stage"}\n' + json.dumps(facts) + "\n", 1.0)


def run_all(out: Path, paper: Paper, *, tool: bool = True, again: bool = False) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for stage in stages(out, device="cuda", large="7b", small="1.1b", tests=out):
        program = "/usr/bin/compute-sanitizer" if tool else None
        found[stage.name] = run_stage(
            stage, out, found, limit=5, again=again, run=paper, find=lambda name, there=program: there
        )
    return found


def test_every_target_has_a_row_and_is_judged(tmp_path: Path) -> None:
    paper = Paper()
    rows = rows_of(run_all(tmp_path, paper), CARD)
    assert len(rows) == 11 and all(row.met is True for row in rows), [row for row in rows if not row.met]
    by_name = {row.name: row for row in rows}
    assert by_name["64 rows, against dequantizing and multiplying"].measured == "4.33 x"  # 260 / 60: EXL2 layers only
    assert by_name["large model, EXL2 4.0, batch 1"].floor == "250 tok/s at 1000 GB/s"
    assert by_name["attention over 32768 keys of q4"].measured == "1.20 x (12.0 us)"
    assert by_name["batch 8, step rate"].measured == "85 % (188 of 220 steps/s)"


@pytest.mark.parametrize(
    ("stage", "facts", "row"),
    [
        ("speed-large", speed(220, 0.87), "large model, EXL2 4.0, batch 1"),
        ("speed-small-exllamav2", speed(400, exllamav2={"decode": 1.49}), "small model, EXL2 4.0, against exllamav2"),
        ("step-small", {"device_step": {**STEP["device_step"], "fixed": 0.26e-3}}, "fixed cost of a step, small model"),
        ("speed-large-8", speed(1400, 0.8, 8), "batch 8, step rate"),
        ("prefill", speed(1, transformers={"prefill": 0.79}), "prompt of 2048, against torch fp16"),
    ],
)
def test_a_target_that_is_missed_is_called_so(tmp_path: Path, stage: str, facts: dict, row: str) -> None:
    found = run_all(tmp_path, Paper())
    found[stage] = Result(stage, facts=facts)
    assert [one.name for one in rows_of(found, CARD) if one.met is not True] == [row]


def test_what_is_asked_of_decoding_depends_on_the_memory() -> None:
    assert CARD.share == 0.88
    assert Card(name="H200", capability=(9, 0), memory=1, torch="", cores=1).share == 0.70


def test_a_stage_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    error = json.dumps(
        {"event": "error", "error": "EvalError", "message": "--peer exllamav2 needs exllamav2\n  hint: x"}
    )
    paper = Paper(
        speed_small_exllamav2=Ran(1, f"noise\n{error}\n", 1.0),
        make_large=Ran(None, "half a line", 5.0),
        tests=Ran(1, "FAILED x\n2 failed, 10 passed, 1 error in 3s", 3.0),
        kernels=Ran(-11, "Segmentation fault", 1.0),
    )
    found = run_all(tmp_path, paper, tool=False)
    rows = {row.name: row for row in rows_of(found, CARD)}
    assert rows["small model, EXL2 4.0, against exllamav2"].note == (
        "not measured; speed-small-exllamav2: --peer exllamav2 needs exllamav2"
    )
    assert found["speed-large"].why == "needs make-large: not done after 5 s" and "speed-large" not in paper.asked
    assert rows["tests on the card"].met is False and rows["tests on the card"].measured == "10 passed, 3 failed"
    assert "Segmentation fault" in rows["64 rows, against dequantizing and multiplying"].note
    assert rows["compute-sanitizer"].note == "not measured; sanitizer: compute-sanitizer is not on PATH"
    text = markdown(list(rows.values()), CARD, found)
    assert "| tests on the card | 10 passed, 3 failed | - | all pass | NO |" in text
    assert text.count("not measured") >= 5 and "| attention over 32768 | q4 | 1 | 12.0 |" in text


def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    run_all(tmp_path, Paper(kernels=Ran(1, "", 1.0)))
    second = Paper()
    found = run_all(tmp_path, second)
    assert second.asked == ["kernels"] and found["kernels"].why is None
    third = Paper()
    run_all(tmp_path, third, again=True)
    assert len(third.asked) == len(found)


def test_a_process_is_run_and_stopped_at_its_limit(tmp_path: Path) -> None:
    python = stages(tmp_path, device="cuda", large="7b", small="1.1b", tests=None)[0].command[0]
    line = "import json; print('noise'); print(json.dumps({'event': 'done', 'here': 'x'}))"
    stage = Stage(name="one", command=(python, "-c", line))
    found = run_stage(stage, tmp_path, {}, limit=60)
    assert found.why is None and found.facts == {"event": "done", "here": "x"}
    assert running.known(tmp_path, stage) == found
    slow = Stage(name="two", command=(python, "-c", "import time; print('begun', flush=True); time.sleep(60)"))
    ran = run_process(slow, 1.0)
    assert ran.code is None and ran.output == "begun\n"


def test_the_stages_are_commands_that_exist(tmp_path: Path) -> None:
    """Every option is one that the command knows."""
    for stage in stages(tmp_path, device="cuda", large="7b", small="1.1b", tests=tmp_path):
        if stage.command[1:3] != ("-m", "eval"):
            continue
        build_parser().parse_args(stage.command[3:])


# --- the command -------------------------------------------------------------------------------------------------


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return parser.parse_args([str(one) for one in given])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="Paper 9000", major=8, minor=9, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(native, "resolve_backend", lambda requested, device: "cuda")
    paper = Paper()
    monkeypatch.setattr(
        running,
        "run_stage",
        lambda *args, **more: run_stage(*args, **{**more, "run": paper, "find": lambda name: name}),
    )
    outcome = command.run(arguments("--out", tmp_path, "--only", "build,tests"), QuietReporter())
    assert paper.asked == ["build", "tests"]
    rows = json.loads((tmp_path / "hardware.json").read_text())["rows"]
    assert [row["name"] for row in rows if row["met"]] == ["first build of the kernels", "tests on the card"]
    assert (tmp_path / "hardware.md").read_text() in outcome.text
    command.run(arguments("--out", tmp_path), QuietReporter())
    assert len(paper.asked) == len(set(paper.asked)), "what was known is not run again"
    assert all(row["met"] for row in json.loads((tmp_path / "hardware.json").read_text())["rows"])
    with pytest.raises(UsageError, match="no stage 'x'"):
        command.run(arguments("--out", tmp_path, "--only", "x"), QuietReporter())


def test_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable):
        command.run(arguments("--out", tmp_path), QuietReporter())
    with pytest.raises(UsageError, match="no GPU"):
        command.run(arguments("--out", tmp_path, "--device", "cpu"), QuietReporter())
    assert not list(tmp_path.iterdir())
