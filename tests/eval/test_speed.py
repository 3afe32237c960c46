"""Speed: the statistics exactly, the race with contestants that only say how long they took."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from contestants import LOAD, Fake

import exl_runtime as exl
from eval.speed.bandwidth import LLC_GUESS, Bandwidth, llc_bytes
from eval.speed.race import Heat, Race, Samples, race, steps_of
from eval.speed.report import Setup, against, facts_of, figures, moved, text_of
from eval.speed.spread import Spread, ratios, short, spread
from eval.speed.timers import wall_timer
from eval.speed.traffic import Traffic, traffic_of
from eval.speed.workload import TURN, Workload, common_length, prompts_of
from exl_runtime.errors import OutOfMemory, UsageError

CPU = torch.device("cpu")


# --- statistics --------------------------------------------------------------------------------------------------


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.0, 4.0, 4)
    assert spread([7.0]).text() == "7.00"
    assert spread([41.26, 39.84, 42.0]).text() == "41.3 (39.8 to 42.0)"
    assert spread([1.0, 3.0]).facts() == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 2}
    with pytest.raises(ValueError, match="no values"):
        spread([])
    with pytest.raises(ValueError, match="not all finite"):
        spread([1.0, float("nan")])


def test_ratios_are_of_run_to_run() -> None:
    assert ratios([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 4.0, 3)
    assert ratios([2.0, 8.0], [1.0]) == Spread(2.0, 2.0, 2.0, 1), "a run that one did not finish does not count"
    assert ratios([1.0], []) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.012345, "0.0123"), (1.2345, "1.23"), (12.345, "12.3"), (123.45, "123"), (1234.5, "1234")],
)
def test_three_digits_count(value: float, text: str) -> None:
    assert short(value) == text


# --- what is run -------------------------------------------------------------------------------------------------


def test_prompts() -> None:
    load = Workload(prompt=40, generate=8, batch=3, filled=100)
    vocabulary = [7, 9, 11, 500]
    first, again, other = (prompts_of(load, run, vocabulary) for run in (0, 0, 1))
    assert first == again
    assert first.cold != other.cold
    assert [len(ids) for ids in first.cold] == [40] * 3
    assert [len(ids) for ids in first.turn] == [40 + TURN] * 3
    assert [len(ids) for ids in first.deep] == [100] * 3
    assert all(turn[:40] == cold for cold, turn in zip(first.cold, first.turn, strict=True))
    assert len(set(first.cold)) == 3
    assert {token for ids in first.deep for token in ids} == set(vocabulary)
    assert not first.deep_is_known
    assert prompts_of(Workload(prompt=40, filled=10), 0, vocabulary).deep_is_known
    assert prompts_of(Workload(prompt=40), 0, vocabulary).deep_is_known
    assert common_length((1, 2, 3), (1, 2, 4, 5)) == 2
    assert common_length((1, 2), (1, 2, 4)) == 2


def test_room_that_a_run_takes() -> None:
    assert Workload(prompt=512, generate=128).context == 641
    assert Workload(prompt=512, generate=16).context == 545
    assert Workload(prompt=16, generate=8, filled=1000).context == 1009
    Workload(prompt=512, generate=128).check(641)
    with pytest.raises(UsageError, match="takes 641 tokens of context, the model has 640"):
        Workload(prompt=512, generate=128).check(640)


def test_traffic() -> None:
    full = Traffic(weights=1000.0, token=10.0, windows=(None, None), batch=1)
    # Steps over 5, 6 and 7 keys in two layers of 10 bytes: 6 on the average.
    assert full.step(4, 3) == 1000 + 2 * 10 * 6
    windowed = Traffic(weights=1000.0, token=10.0, windows=(None, 5), batch=2)
    assert windowed.step(4, 3) == 1000 + 2 * (10 * 6 + 10 * 5)


def test_traffic_of_the_demo() -> None:
    with exl.load("demo", context=256, threads=1) as runtime:
        found = traffic_of(runtime, 1)
        spec = runtime._generator.model.spec
        model = runtime._generator.model
        linears = [model.head, *(linear for block in model.blocks for linear in block.linears)]
    assert found.weights == sum(linear.nbytes for linear in linears), "everything but the embedding"
    assert found.token == 2 * spec.kv_heads * spec.head_dim * 4
    assert found.windows == (None,) * 6


# --- timers and bandwidth ----------------------------------------------------------------------------------------


def ticking(*steps: float) -> Callable[[], float]:
    """A clock: 0 at the first look, then on by the next of `steps` at every look."""
    times = itertools.accumulate(steps, initial=0.0)
    return lambda: next(times)


def test_wall_timer() -> None:
    done = []
    timed = wall_timer(ticking(2.5, 1.0, 4.0))
    assert timed(lambda: done.append(1)) == 2.5
    assert timed(lambda: done.append(2)) == 4.0
    assert done == [1, 2]


def test_bandwidth_is_of_the_best_pass() -> None:
    times = iter([4.0, 2.0, 8.0, 9.0, 9.0, 9.0])
    reads = []

    def timer(work: Callable[[], object]) -> float:
        reads.append(work())
        return next(times)

    assert Bandwidth(CPU, timer=timer, nbytes=1 << 20).measure() == (1 << 20) / 2.0
    assert len(reads) == 6
    with pytest.raises(OutOfMemory, match="measuring the bandwidth of memory takes 1073741824 MiB"):
        Bandwidth(CPU, nbytes=1 << 50)


def test_last_level_cache(tmp_path: Path) -> None:
    for index, (level, size) in enumerate((("1", "32K"), ("1", "32K"), ("3", "24M"), ("2", "1024K"))):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert llc_bytes(CPU, tmp_path) == 24 << 20
    assert llc_bytes(CPU, tmp_path / "absent") == LLC_GUESS
    (tmp_path / "index2" / "size").write_text("many\n")
    assert llc_bytes(CPU, tmp_path) == 1 << 20


# --- the race ----------------------------------------------------------------------------------------------------


def raced(contestants: Sequence[Fake], threads: Sequence[int | None] = (None,), notes: list[str] | None = None) -> Race:
    return race(
        contestants,
        LOAD,
        threads,
        prompts=lambda run: prompts_of(LOAD, run, [5, 6, 7]),
        bandwidth=lambda: 1000.0,
        advance=(notes if notes is not None else []).append,
    )


def test_runs_alternate() -> None:
    log: list[str] = []
    notes: list[str] = []
    found = raced([Fake("a", log), Fake("b", log)], (1, 2), notes)
    run = ["a cold", "a turn", "a decode", "b cold", "b turn", "b decode"]
    assert log == [*("a warm 1", "b warm 1"), *run, *run, *("a warm 2", "b warm 2"), *run, *run]
    assert len(notes) == steps_of(LOAD, 2, 2)
    assert [heat.threads for heat in found.heats] == [1, 2]
    assert found.heats[0].samples["a"] == Samples([1.0, 1.0], [0.25, 0.25], [2.0, 2.0])
    assert not found.partial


def test_ctrl_c_keeps_what_there_is() -> None:
    log: list[str] = []
    found = raced([Fake("a", log), Fake("b", log, stop_at="b turn")])
    assert found.partial
    assert not found.empty
    assert found.heats[0].samples["b"] == Samples([1.0, 1.0], [0.25], [2.0])
    told = text_of(found, setup_of())
    assert "PARTIAL: interrupted" in told
    assert json.loads(told.splitlines()[-1])["partial"] is True


def setup_of() -> Setup:
    return Setup(
        model="made",
        device="cpu",
        traffic=Traffic(weights=900.0, token=1.0, windows=(None,), batch=1),
        weight_bytes=1000,
        cache_bytes=10,
        peak_bytes=5000,
        base_bytes=3000,
        details={"a": {"version": "1", "x": 1.23456}},
    )


def test_figures_are_exact() -> None:
    load = Workload(prompt=512, generate=128, batch=2, runs=2)
    samples = Samples(cold=[2.0, 4.0], turn=[0.5, 0.25], decode=[1.0, 2.0])
    found = figures(samples, load)
    assert found["prefill_tokens_per_second"] == Spread(384.0, 256.0, 512.0, 2)
    assert found["first_token_cold_seconds"] == Spread(3.0, 2.0, 4.0, 2)
    assert found["first_token_hit_seconds"] == Spread(0.375, 0.25, 0.5, 2)
    assert found["decode_tokens_per_second"] == Spread(192.0, 128.0, 256.0, 2)
    assert figures(Samples(), load) == {}
    slower = Samples(cold=[4.0, 4.0], turn=[0.5, 0.5], decode=[3.0, 2.0])
    assert against(samples, slower) == {
        "prefill": Spread(1.5, 1.0, 2.0, 2),
        "turn": Spread(1.5, 1.0, 2.0, 2),
        "decode": Spread(2.0, 1.0, 3.0, 2),
    }


def test_bytes_per_second_are_exact() -> None:
    load = Workload(prompt=4, generate=3, runs=1)
    traffic = Traffic(weights=940.0, token=10.0, windows=(None,), batch=1)  # 1000 bytes a step, see above
    heat = Heat(None, {}, bandwidth=[6000.0, 12000.0])
    rates, shares = moved(heat, Samples(decode=[1.0, 0.5]), load, traffic)
    assert rates == Spread(4500.0, 3000.0, 6000.0, 2)
    assert shares == Spread(0.5, 0.5, 0.5, 2)
    assert moved(Heat(None, {}), Samples(), load, traffic) is None


def test_report() -> None:
    log: list[str] = []
    found = raced([Fake("a", log), Fake("b", log, seconds=1.5)], (1,))
    setup = setup_of()
    facts = facts_of(found, setup)
    heat = facts["heats"][0]
    assert heat["times_as_fast_as"]["b"]["decode"] == {"median": 1.5, "min": 1.5, "max": 1.5, "runs": 2}
    assert heat["figures"]["b"]["prefill_tokens_per_second"]["median"] == pytest.approx(64 / 1.5)
    assert facts["bytes_per_step"] == 900 + 64 + 16.5
    assert heat["share_of_bandwidth"]["median"] == pytest.approx(980.5 * 32 / 2.0 / 1000.0)
    text = text_of(found, setup)
    assert json.loads(text.splitlines()[-1]) == json.loads(json.dumps(facts))
    assert "1 thread" in text and "x b" in text and "PARTIAL" not in text
    assert "a: version 1, x 1.23" in text
