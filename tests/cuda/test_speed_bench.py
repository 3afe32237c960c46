"""What `eval kernels` and `eval step` time on a card, run by emulation: the right work, and exact figures of it."""

import pytest
import torch
from driving import open_model
from quantize import quantize_folder
from recording import FakeRecorder
from tiny import by_name, write

from eval.made.shape import Shape
from eval.speed import kernels
from eval.speed.cases import DEQUANT, Stored, Where, attention_case, linear_cases
from eval.speed.device_step import CALLS, SAMPLES, Unrecorded, facts_of, measure_step, products_of, text_of
from exl_runtime.cache.types import FP16, FP32, cache_type
from exl_runtime.model.fused import FusedTransformer

CPU = torch.device("cpu")
TINY = Shape(hidden=64, inner=96, layers=1, heads=4, kv_heads=2, vocab=128)


@pytest.fixture
def where(emulated) -> Where:
    return Where(device=CPU, backend="cuda", cache_bytes=10_000)


@pytest.mark.parametrize("stored", [Stored("exl2", 4), Stored("gptq", 4), Stored("dense", 16)], ids=str)
def test_matrices_compute_what_torch_computes(where, stored) -> None:
    for case in linear_cases("q", 64, 96, stored, (1, 40), where):
        wanted = case.others["fp16"][0](0)
        got = case.call(case.copies - 1)
        assert got.dtype == wanted.dtype == torch.float16 and got.shape == wanted.shape == (case.m, 96)
        torch.testing.assert_close(got, wanted, atol=1e-2, rtol=1e-2)
        assert (DEQUANT in case.others) == (stored.format != "dense")
        if stored.format != "dense":
            call, copies = case.others[DEQUANT]
            assert copies == case.copies
            torch.testing.assert_close(call(0), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["fp16", "q8", "q4", "k6v4"])
def test_attention_computes_what_torch_computes(where, name) -> None:
    cache = cache_type(name)
    case = attention_case(TINY, 300, cache, where)
    assert case.nbytes == 300 * 2 * sum(cache.row_lengths(16)) * cache.dtype.itemsize and case.stored == name
    ((torch_one, _),) = case.others.values()
    for copy in range(2):
        ours, theirs = case.call(copy).flatten().float(), torch_one(copy).flatten().float()
        torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=4e-3)


def test_what_is_timed_on_a_card_by_default() -> None:
    card = torch.device("cuda")
    assert [cache.name for cache in kernels.usual_caches(card)] == ["fp16", "q8", "q4"]
    assert [cache.name for cache in kernels.usual_caches(CPU)] == ["fp32", "fp16"]
    assert kernels.usual_contexts(card) == (2048, 32768)


# --- one step ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(emulated, tmp_path_factory) -> FusedTransformer:
    root = tmp_path_factory.mktemp("step")
    folder = root / "exl2"
    quantize_folder(write(by_name("llama"), root), folder, "exl2")
    return open_model(folder, "cuda", torch.float16)


class Clock:
    """A second for every look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_step_is_taken_apart(model) -> None:
    recorder = FakeRecorder()
    timed: list[float] = []

    def timer(work) -> float:
        before = recorder.repeated
        work()
        timed.append(0.0)
        assert recorder.repeated - before == CALLS
        return 0.2 if len(timed) <= SAMPLES else 0.02

    found = measure_step(model, recorder, cache=FP16, context=20, steps=3, clock=Clock(), timer=timer, bandwidth=1e9)
    assert (found.recorded, found.eager) == (1 / 3, 1 / 3)  # one second, three steps
    assert (found.products, found.empty) == (0.2 / CALLS, 0.02 / CALLS)
    assert found.fixed == found.recorded - found.products
    # Recorded: the products, the empty step, and one bucket of pages; eager steps record nothing.
    assert recorder.recorded == 3 and len(timed) == 2 * SAMPLES
    linears = [model.head, *(linear for block in model.blocks for linear in block.linears)]
    spec = model.spec
    keys = len(spec.layers) * 2 * 23 * spec.kv_heads * spec.head_dim * 2
    assert found.read == sum(linear.nbytes for linear in linears) + keys
    assert facts_of(found)["fixed"] == found.fixed
    assert "attention over 20 keys included" in text_of(found)


def test_the_products_are_those_of_a_pass(model, monkeypatch) -> None:
    """Every matrix is multiplied once, joined as in a pass."""
    seen: list[int] = []
    plain = type(model.head.kernel).__mro__[1]
    from exl_runtime.ops.linear import packed_cuda

    call = packed_cuda.Plan.__call__

    def counted(plan, x, **more):
        seen.append(len(plan._keep[0]))
        return call(plan, x, **more)

    assert plain is packed_cuda.PackedCuda
    monkeypatch.setattr(packed_cuda.Plan, "__call__", counted)
    products_of(model)()
    assert sum(seen) == sum(len(block.linears) for block in model.blocks) + 1


def test_what_cannot_be_recorded_is_refused(model) -> None:
    more = {"context": 4, "steps": 1, "clock": Clock(), "timer": lambda work: 1.0, "bandwidth": 1.0}
    with pytest.raises(ValueError, match="float32"):
        measure_step(model, FakeRecorder(), cache=FP32, **more)
    with pytest.raises(ValueError, match="no graphs"):
        measure_step(model, FakeRecorder("no graphs"), cache=FP16, **more)
    assert Unrecorded(FakeRecorder("no graphs")).why_not() == "no graphs"
