"""Where a step spends its time: what is counted, what is not, and the command from end to end. No time is judged."""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import unavailable

import exl_runtime as exl
from eval.commands import step
from eval.speed import bandwidth as bandwidth_module
from eval.speed.breakdown import (
    BETWEEN,
    NATIVE,
    PARTS,
    PRODUCTS,
    WAITING,
    Breakdown,
    Kept,
    Watch,
    break_down,
    text_of,
    watching,
)
from eval.speed.traffic import traffic_of
from exl_runtime.checkpoint.threads import usable_processors
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


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    now = iter(range(100))
    watch = Watch(clock=lambda: float(next(now)))  # asked at 0
    native = SimpleNamespace(program=SimpleNamespace(times=lambda timed: {"mlp": 0.25}))
    plan = SimpleNamespace(tokens=[5], rope_lengths=(8,))
    run = watch.run_of(lambda step, plan: None)
    step = watch.step_of(lambda: run(native, plan))
    step()
    step()
    # Begins at 1, the pass from 2 to 3, its phases are asked for from 4 to 5, ends at 6; looked at the clock at 7.
    assert watch.spent == {PARTS[0][2]: 3.0, NATIVE: 1.0}
    assert watch.walls == [7.0, 7.0] and watch.asides == [1.0, 1.0] and watch.phases == [{"mlp": 0.25}] * 2


def test_what_ran_beside_a_pass_is_no_part_of_it() -> None:
    watch = Watch()
    watch.steps = [{"engine": 1.0, NATIVE: 6.0}] * 4
    watch.phases = [{"mlp": 4.0, "attend": 1.0, "norm": 0.5}] * 4
    watch.walls, watch.asides = [9.0] * 4, [1.0] * 4
    plain, ahead = Kept(), Kept()
    plain.add(watch, 0)
    ahead.add(watch, 3)
    assert plain.walls == [8.0, 8.0] and plain.rests == [3.0, 3.0] and plain.ahead == 0
    assert plain.around == [{"engine": 1.0, NATIVE: 0.5, BETWEEN: 1.0}] * 2  # and 5.5 of phases: 8
    assert ahead.walls == [9.0, 9.0] and ahead.rests == [4.0, 4.0] and ahead.ahead == 2
    assert ahead.around == [{"engine": 1.0, WAITING: 6.0, BETWEEN: 1.0}] * 2  # and 1 of asking: 9
    assert watch.steps[0] == {"engine": 1.0, NATIVE: 6.0}


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("ahead", [True, False])
def test_the_parts_make_up_the_step(ahead: bool) -> None:
    with exl.load("demo", context=512, threads=1) as runtime:
        found = break_down(runtime, [5, 6, 7] * 10, 12, traffic=traffic_of(runtime, 1), bandwidth=1e10, ahead=ahead)
    assert found.steps == 12 and found.threads == 1
    beside = ahead and usable_processors() > 1
    assert found.ahead == beside
    assert set(PRODUCTS) < set(found.phases)
    labels = {label for _, _, label in PARTS} - {NATIVE}
    assert set(found.around) == labels | {BETWEEN, WAITING if beside else NATIVE}
    assert all(seconds > 0 for seconds in (found.products, found.attention, found.rest, found.python))
    assert found.read > 3e6  # the demo's matrices


def test_the_text_says_what_the_memory_would_allow() -> None:
    found = Breakdown(1, 3, 0.02, {"mlp": 0.015, "attend": 0.002}, {"engine": 0.003}, 0.003, 1e8, 1e10)
    text = text_of(found)
    assert "a step: 20.0 ms, of it products 15.0, attention 2.00, everything else 3.00" in text
    assert "100 MB, 10.0 ms at 10.0 GB/s: 50 % of the bandwidth" in text
    assert "Python around the pass: 3.00 ms" in text and "ahead" not in text
    assert "beside it in 75 % of the steps" in text_of(replace(found, ahead=0.75))


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
    assert [table["begun_ahead"] for table in command("demo", "--threads", "1", "--no-ahead").facts["tables"]] == [0.0]


@pytest.mark.usefixtures("_kernels", "small_memory")
def test_what_has_no_native_pass_is_refused() -> None:
    with pytest.raises(UsageError, match="backends cpu and cuda only"):
        command("demo", "--backend", "reference", "--threads", "1")
