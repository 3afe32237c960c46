"""Timing of single operations: cases compute what torch computes, copies are cold, figures are exact."""

import argparse
import json
from collections.abc import Callable, Iterator

import pytest
import torch

from eval.commands import kernels as command
from eval.made.shape import PRESETS, Shape
from eval.speed import bandwidth as bandwidth_module
from eval.speed import kernels
from eval.speed.cases import Case, Stored, Where, attention_case, linear_cases, matrices, small_cases, stored_as
from eval.speed.kernels import Bench, Measured, bench, count_cases, facts_of, text_of
from exl_runtime.cache.types import cache_type
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import UsageError
from exl_runtime.ops import native

CPU = torch.device("cpu")
TINY = Shape(hidden=64, inner=96, layers=1, heads=4, kv_heads=2, vocab=128)
BACKENDS = ("cpu", "reference")
STORED = [Stored("exl2", 4), Stored("exl2", 3.6), Stored("gptq", 3), Stored("dense", 16)]


@pytest.fixture(params=BACKENDS)
def where(request: pytest.FixtureRequest) -> Where:
    if request.param == "cpu" and (why := native.available()):
        pytest.skip(why)
    return Where(device=CPU, backend=request.param, cache_bytes=10_000)


# --- the cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_linears_compute_what_torch_computes(where: Where, stored: Stored) -> None:
    for name, inputs, outputs in matrices(TINY):
        if name == "head" and stored.format == "gptq":
            continue
        for case in linear_cases(name, inputs, outputs, stored, (1, 5), where):
            expected = case.others["fp32"][0](0)
            assert expected.shape == (case.m, outputs)
            for copy in {0, case.copies - 1}:
                torch.testing.assert_close(case.call(copy), expected, atol=1e-2, rtol=1e-2)
            bf16 = case.others["bf16"][0](case.others["bf16"][1] - 1)
            assert bf16.dtype == torch.bfloat16
            torch.testing.assert_close(bf16.float(), expected, atol=0.1, rtol=0.1)
            assert case.flop == 2 * case.m * inputs * outputs


def test_attention_computes_what_torch_computes(where: Where) -> None:
    for cache in map(cache_type, ("fp32", "fp16", "q8", "k6v4")):
        for context in (1, 300):
            case = attention_case(TINY, context, cache, where)
            ((torch_one, copies),) = case.others.values()
            for copy in range(case.copies):
                ours, theirs = case.call(copy).flatten(), torch_one(copy).float().flatten()
                torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
            assert copies == case.copies
            assert case.stored == cache.name
            assert case.nbytes == context * 2 * sum(cache.row_lengths(16)) * cache.dtype.itemsize
        if not cache.quantized:
            assert not torch.equal(case.call(0), case.call(1)), "copies are different memory"


def test_small_operations_compute_what_torch_computes(where: Where) -> None:
    cases = list(small_cases(TINY, (1, 3), where))
    assert [case.name for case in cases] == ["rms_norm", "silu * up", "rope", "append_kv"] * 2
    for case in cases:
        ((plain, _),) = case.others.values()
        if case.name in ("rms_norm", "silu * up"):
            torch.testing.assert_close(case.call(1), plain(1), atol=1e-5, rtol=1e-5)
        else:
            case.call(0)
            plain(1)


def test_copies_exceed_the_cache() -> None:
    where = Where(device=CPU, backend="reference", cache_bytes=100_000)
    assert where.copies(800_000) == 2
    assert where.copies(1_000_000) == 2
    assert where.copies(200_000) == 4
    assert where.copies(60_000) == 14
    assert where.copies(10) == 1024
    for case in linear_cases("q", 64, 64, Stored("exl2", 4), (1,), where):
        assert case.copies * case.nbytes >= 8 * where.cache_bytes
        assert {call(0).dtype for call, _ in case.others.values()} == {torch.float32, torch.bfloat16}


def test_which_matrices_and_widths() -> None:
    assert matrices(PRESETS["1.1b"]) == [
        ("q,o", 2048, 2048),
        ("k,v", 2048, 256),
        ("gate,up", 2048, 5632),
        ("down", 5632, 2048),
        ("head", 2048, 32000),
    ]
    assert matrices(PRESETS["7b"])[0] == ("q,k,v,o", 4096, 4096)
    assert stored_as(["exl2", "gptq", "dense"], [4.0, 5.0]) == [
        Stored("exl2", 4.0),
        Stored("exl2", 5.0),
        Stored("gptq", 4.0),
        Stored("dense", 16),
    ]
    assert [str(one) for one in stored_as(["exl2", "dense"], [3.6])] == ["exl2 3.6", "bf16"]
    for formats, bits in ((["awq"], [4.0]), (["exl2"], [9.0]), (["gptq"], [5.0])):
        with pytest.raises(UsageError):
            stored_as(formats, bits)


def test_the_count_is_that_of_the_cases(where: Where) -> None:
    what = (TINY, STORED, (1, 2), (16,), kernels.KINDS, (cache_type("fp32"), cache_type("q4")))
    cases = list(kernels.all_cases(*what, where))
    assert len(cases) == count_cases(*what)
    heads = [case for case in cases if case.name.startswith("head") and case.m == 1]
    assert [case.stored for case in heads] == ["exl2 6", "bf16"], "the head once in EXL2, never in GPTQ"


# --- timing ------------------------------------------------------------------------------------------------------


def made(log: list[int], copies: int = 3, stop_after: int = 10**9) -> Case:
    def call(i: int) -> None:
        log.append(i)
        if len(log) > stop_after:
            raise KeyboardInterrupt

    return Case(
        kind="linear",
        name="q 4x4",
        stored="exl2 4",
        m=1,
        call=call,
        copies=copies,
        nbytes=4000.0,
        flop=8000.0,
        others={"fp32": (lambda i: None, 2)},
    )


def timer_of(*seconds: float) -> Callable[[Callable[[], object]], float]:
    times: Iterator[float] = iter(seconds)

    def timer(work: Callable[[], object]) -> float:
        work()
        return next(times)

    return timer


def measured(case: Case, timer: Callable[[Callable[[], object]], float], runs: int = 3) -> Bench:
    threads: list[int] = []
    found = bench(
        lambda: [case],
        (2,),
        set_threads=threads.append,
        timer=timer,
        bandwidth=lambda: 1e6,
        runs=runs,
    )
    assert threads == [2]
    return found


def test_samples_are_means_over_calls_that_go_round() -> None:
    log: list[int] = []
    # 4 ms a call: three calls make a sample of at least 10 ms; torch's takes 20 ms, one call.
    found = measured(made(log), timer_of(0.004, 0.020, 0.012, 0.020, 0.018, 0.030, 0.009, 0.010))
    (row,) = found.rows
    assert row.seconds == pytest.approx((0.004, 0.006, 0.003))
    assert row.others == {"fp32": pytest.approx((0.020, 0.030, 0.010))}
    assert row.floor == 0.004
    assert log == [0, 1, *(2, 0, 1), *(2, 0, 1), *(2, 0, 1)], "never the copy that was read last"
    (facts,) = facts_of(found)["operations"]
    assert facts["share_of_floor"] == pytest.approx(1.0)
    assert facts["flop_per_second"] == pytest.approx(2e6)
    assert facts["times_as_fast_as_torch"]["fp32"] == {
        "median": pytest.approx(5.0),
        "min": pytest.approx(10 / 3),
        "max": pytest.approx(5.0),
        "runs": 3,
    }
    text = text_of(found, ["heading"])
    assert text.startswith("heading\n")
    assert "linear, 2 threads" in text
    assert json.loads(text.splitlines()[-1])["operations"][0]["m"] == 1


def test_ctrl_c_keeps_what_there_is() -> None:
    log: list[int] = []
    cases = [made(log), made(log, stop_after=15)]
    found = bench(
        lambda: cases, (None,), set_threads=lambda n: None, timer=timer_of(*[0.02] * 99), bandwidth=lambda: 1e6, runs=9
    )
    assert found.partial
    assert len(found.rows) == 1
    assert "PARTIAL: interrupted" in text_of(found, [])


def test_floor_and_table() -> None:
    row = Measured(case=made([]), threads=None, seconds=(0.008,), others={"fp32": (0.004,)}, bandwidth=2e6)
    assert row.floor == 0.002
    text = text_of(Bench([row]), [])
    line = next(line for line in text.splitlines() if line.startswith("q 4x4"))
    assert line.split()[-6:] == ["1", "8000", "0.000500", "25.0", "0.00100", "0.500"]


# --- the command -------------------------------------------------------------------------------------------------


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return parser.parse_args([str(one) for one in given])


SMALL = ("--shapes", "64/96/1/4/2/128", "--m", "1,3", "--contexts", "16", "--runs", 2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_module, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth_module, "llc_bytes", lambda device: 1 << 16)


@pytest.mark.usefixtures("quick")
def test_command() -> None:
    outcome = command.run(arguments(*SMALL, "--threads", 1, "--device", "cpu"), QuietReporter())
    assert outcome.code == 0
    operations = json.loads(outcome.text.splitlines()[-1])["operations"]
    kinds = {one["kind"] for one in operations}
    assert kinds == {"linear", "attention", "small"}
    # Four matrices in three formats and two heads, at two sizes; two cache types; four small ones at two sizes.
    assert len(operations) == 2 * (4 * 3 + 2) + 2 + 8
    for one in operations:
        assert one["seconds"]["runs"] == 2
        assert one["floor_seconds"] > 0 and one["seconds"]["min"] > 0
    assert "x torch bf16" in outcome.text


@pytest.mark.usefixtures("quick")
def test_command_refuses() -> None:
    for given in (("--ops", "linear,conv"), ("--format", "awq"), ("--bits", "9"), ("--shapes", "70b")):
        with pytest.raises(UsageError):
            command.run(arguments(*given), QuietReporter())
    with pytest.raises(SystemExit):
        arguments("--m", "1,x")
    with pytest.raises(SystemExit):
        arguments("--bits", "four")
