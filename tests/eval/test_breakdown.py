"""Where a step spends its time: what is counted, what is not, and the command from end to end. No time is judged."""

import argparse

import pytest
from conftest import unavailable

import exl_runtime as exl
from eval.commands import step
from eval.speed import bandwidth as bandwidth_module
from eval.speed.breakdown import NATIVE, PARTS, PRODUCTS, Breakdown, Watch, break_down, text_of, watching
from eval.speed.traffic import traffic_of
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import UsageError
from exl_runtime.generation.runner import Runner


@pytest.fixture
def _kernels() -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)


def test_nested_parts_are_counted_once() -> None:
    now = iter(range(100))
    watch = Watch(clock=lambda: float(next(now)))
    inner = watch.wrap(lambda: None, "inner")  # a second each

    def work() -> None:
        inner()
        inner()

    watch.wrap(work, "outer")()  # five seconds from clock to clock, of which two are the inner one's
    assert watch.spent == {"inner": 2.0, "outer": 3.0}


def test_a_failure_leaves_the_count_in_order() -> None:
    now = iter(range(100))
    watch = Watch(clock=lambda: float(next(now)))
    failing = watch.wrap(lambda: [][0], "failing")
    with pytest.raises(IndexError):
        failing()
    watch.wrap(lambda: None, "next")()
    assert watch.spent == {"failing": 1.0, "next": 1.0}


def test_every_part_is_there_and_everything_is_put_back_afterwards() -> None:
    before = [vars(owner)[name] for owner, name, _ in PARTS]
    with watching(Watch()):
        assert Runner.run is not before[[name for _, _, name in PARTS].index("runner")]
    assert [vars(owner)[name] for owner, name, _ in PARTS] == before


@pytest.mark.usefixtures("_kernels")
def test_the_parts_make_up_the_step() -> None:
    with exl.load("demo", context=512, threads=1) as runtime:
        found = break_down(runtime, [5, 6, 7] * 10, 12, traffic=traffic_of(runtime, 1), bandwidth=1e10)
    assert found.steps == 12 and found.threads == 1
    assert set(PRODUCTS) < set(found.phases) and NATIVE in found.around
    assert {label for _, _, label in PARTS} == set(found.around)
    assert all(seconds > 0 for seconds in (found.products, found.attention, found.rest))
    medians = sum(found.phases.values()) + sum(found.around.values())
    assert medians == pytest.approx(found.products + found.attention + found.rest)
    assert found.read > 3e6  # the demo's matrices


def test_the_text_says_what_the_memory_would_allow() -> None:
    found = Breakdown(1, 3, 0.02, {"mlp": 0.015, "attend": 0.002}, {"engine": 0.003}, 1e8, 1e10)
    text = text_of(found)
    assert "a step: 20.0 ms, of it products 15.0, attention 2.00, everything else 3.00" in text
    assert "100 MB, 10.0 ms at 10.0 GB/s: 50 % of the bandwidth" in text


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_module, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth_module, "llc_bytes", lambda device: 1 << 10)


def command(model: str, *options: str):
    parser = argparse.ArgumentParser()
    step.add(parser)
    return step.run(parser.parse_args([model, "--prompt", "20", "--generate", "6", *options]), QuietReporter())


@pytest.mark.usefixtures("_kernels", "small_memory")
def test_the_command_tells_one_table_for_each_number_of_threads() -> None:
    outcome = command("demo", "--threads", "2,1")
    assert [table["threads"] for table in outcome.facts["tables"]] == [2, 1]
    assert outcome.text.count("a step: ") == 2


@pytest.mark.usefixtures("_kernels", "small_memory")
def test_what_has_no_native_pass_is_refused() -> None:
    with pytest.raises(UsageError, match="backends cpu and cuda only"):
        command("demo", "--backend", "reference", "--threads", "1")
