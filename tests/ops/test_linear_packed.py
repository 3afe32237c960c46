"""The packed matrix kernels: codes and scales without loss, near-float32 accuracy, the same bits in any batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import dense_tensors, exl2_tensors, gptq_tensors, unrounded
from oracles import same_bits
from safetensors import safe_open

from exl_runtime.formats import FormatHints, LinearShape, load_linear
from exl_runtime.formats.base import QuantFormat
from exl_runtime.formats.exl2 import Exl2
from exl_runtime.formats.gptq import Gptq
from exl_runtime.ops import native
from exl_runtime.ops.linear import select
from exl_runtime.ops.linear.packed_cpu import PackedCpu, multiply_together
from exl_runtime.ops.linear.tiles import Residual, span_table

CPU = torch.device("cpu")
EVERY_WIDTH = [(8, 32), (6, 64), (5, 32), (4, 96), (3, 64), (2, 32)]  # K = 320
BUNDLED = Path(__file__).resolve().parent.parent / "data" / "vectors"
# A number in a span has an error of up to 1/2 of the quantization step, the span's largest / 127 (/ 256 with the
# residual). The largest of 128 normal inputs is about 2.7: of the result that is 1 / sqrt(12) * 2.7 / 127 (/ 256).
PLAIN, EXACT = 1.0e-2, 4.0e-5

pytestmark = pytest.mark.usefixtures("kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exl2(layout: list[tuple[int, int]], outputs: int, permuted: bool = True, seed: int = 0) -> Exl2:
    shape = LinearShape(sum(rows for _, rows in layout), outputs)
    return load_linear(exl2_tensors(layout, outputs, permuted=permuted, seed=seed), shape, where="m")


def gptq(bits: int, inputs: int, outputs: int, group_size: int, act_order: bool, seed: int = 0) -> Gptq:
    tensors = gptq_tensors(bits, inputs, outputs, group_size, act_order=act_order, seed=seed)
    declared = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False}
    return load_linear(tensors, LinearShape(inputs, outputs), where="m", hints=FormatHints.from_json(declared))


def symmetric(bits: int, inputs: int, outputs: int, group_size: int) -> Gptq:
    w = gptq(bits, inputs, outputs, group_size, act_order=False)
    w.zeros.fill_(1 << (bits - 1))
    return w


MATRICES = {
    "exl2 every width": lambda: exl2(EVERY_WIDTH, 96),
    "exl2 odd columns": lambda: exl2([(8, 128), (6, 128), (5, 64), (4, 256), (3, 64), (2, 512)], 33),
    "exl2 in order": lambda: exl2([(4, 64), (4, 32)], 160, permuted=False),
    "exl2 many small groups": lambda: exl2([(4, 32)] * 19, 40),
    "exl2 several panels": lambda: exl2([(5, 1024), (4, 960), (4, 160), (3, 2080), (2, 64)], 40),
    "exl2 K = 32": lambda: exl2([(6, 32)], 32),
    "exl2 one column": lambda: exl2([(3, 160), (2, 32)], 1),
    "gptq 2 bit": lambda: gptq(2, 640, 96, 128, act_order=True),
    "gptq 3 bit": lambda: gptq(3, 640, 32, 64, act_order=False),
    "gptq 3 bit, odd groups": lambda: gptq(3, 96, 32, 20, act_order=True),
    "gptq 4 bit": lambda: gptq(4, 640, 160, 32, act_order=False),
    "gptq 4 bit, groups of 40, order": lambda: gptq(4, 640, 96, 40, act_order=True),
    "gptq 4 bit, rows not whole units": lambda: gptq(4, 40, 40, 8, act_order=False),
    "gptq 4 bit, symmetric": lambda: symmetric(4, 384, 24, 128),
    "gptq 8 bit, one group": lambda: gptq(8, 1056, 32, -1, act_order=True),
    "gptq 3 bit, one group, several panels": lambda: gptq(3, 4160, 32, -1, act_order=False),
    "gptq 4 bit, several panels": lambda: gptq(4, 4128, 40, 96, act_order=True),
    "gptq 4 bit, symmetric, several panels": lambda: symmetric(4, 2592, 24, 96),
    "gptq 8 bit, symmetric": lambda: symmetric(8, 256, 32, 32),
}


@pytest.fixture(params=MATRICES.values(), ids=MATRICES.keys())
def matrix(request: pytest.FixtureRequest) -> QuantFormat:
    return request.param()


def build(w: QuantFormat, residual: int = Residual.ALWAYS) -> PackedCpu:
    kernel = select.select(w, CPU, "cpu")
    assert isinstance(kernel, PackedCpu)
    kernel.residual = residual
    return kernel


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all results together, relative."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def test_accuracy_and_the_same_bits_in_any_batch(matrix: QuantFormat, isa: str) -> None:
    kernel, weight = build(matrix), unrounded(matrix)
    x = random(33, weight.shape[0])
    # Hardly any result may be off by more than the rounding of the format itself, whatever the kernel.
    assert error(kernel(x), x.double() @ matrix.dequantize().double()) < 4e-4
    for residual, bound in ((Residual.ALWAYS, EXACT), (Residual.NEVER, PLAIN)):
        kernel.residual = residual
        whole = kernel(x)
        assert error(whole, x.double() @ weight) < bound
        for rows in range(1, 33):
            assert same_bits(kernel(x[:rows]), whole[:rows]), f"{rows} rows"
        assert same_bits(kernel(x[30:31]), whole[30:31])
        assert same_bits(kernel(x[25:33])[5:6], whole[30:31])
    assert kernel(x[:0]).shape == (0, weight.shape[1])


def test_all_instruction_sets_agree_to_the_last_bit(matrix: QuantFormat, restore: None) -> None:
    kernel, results = build(matrix), []
    x = random(19, matrix.shape.in_features) * torch.logspace(-8, 8, 19)[:, None]
    for name in ("portable", "avx2", "avx512"):
        try:
            native.ops().set_isa(name)
        except RuntimeError:
            continue
        for residual in (Residual.ALWAYS, Residual.NEVER):
            kernel.residual = residual
            results.append([residual, kernel(x), kernel(x[:2]), kernel(x[:1])])
    for other in results[2:]:
        same = results[0] if other[0] == Residual.ALWAYS else results[1]
        assert all(same_bits(a, b) for a, b in zip(same[1:], other[1:], strict=True))


@pytest.mark.parametrize("outputs", [32, 4160])
def test_the_number_of_threads_does_not_matter(outputs: int, restore: None) -> None:
    kernel, x, seen = build(exl2(EVERY_WIDTH, outputs)), random(600, 320), []
    for threads in (1, 2, 3, 7):
        native.ops().set_threads(threads)
        seen.append([kernel(x), kernel(x[:3]), kernel(x[:1])])
    for other in seen[1:]:
        assert all(same_bits(a, b) for a, b in zip(seen[0], other, strict=True))


def check_codes(w: QuantFormat) -> None:
    """Rows of the identity pick single weights. Rounded are 1 / 127, the scale times that, and the sum: 3 x 2^-24."""
    expected = unrounded(w)
    for residual in (Residual.ALWAYS, Residual.NEVER):
        picked = build(w, residual)(torch.eye(w.shape.in_features))
        torch.testing.assert_close(picked.double(), expected, rtol=3.01 * 2**-24, atol=0.0)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=8),
    blocks=st.lists(st.sampled_from([1, 2, 3, 5, 17]), min_size=8, max_size=8),
    outputs=st.integers(1, 70),
    permuted=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_exl2_layout_is_packed_without_loss(
    widths: list[int], blocks: list[int], outputs: int, permuted: bool, seed: int
) -> None:
    layout = [(bits, 32 * count) for bits, count in zip(sorted(widths, reverse=True), blocks, strict=False)]
    check_codes(exl2(layout, outputs, permuted, seed))


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 3),
    group_size=st.sampled_from([-1, 8, 20, 32, 64, 100, 128, 200]),
    act_order=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_gptq_layout_is_packed_without_loss(
    bits: int, inputs: int, outputs: int, group_size: int, act_order: bool, seed: int
) -> None:
    check_codes(gptq(bits, 32 * inputs, 32 * outputs, group_size, act_order, seed))


def read_vector(path: Path) -> tuple[QuantFormat, torch.Tensor]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    expected = tensors.pop("expected")
    declared = None
    if about["format"] == "gptq":
        word = about["v1_decode"] == "word"
        declared = {
            "quant_method": "gptq",
            "bits": int(about["bits"]),
            "group_size": int(about["group_size"]),
            "checkpoint_format": "gptq_v2" if about["zeros"] == "v2" else "gptq",
            "sym": not word,
            "meta": {"quantizer": ["gptqmodel:7.7.0"]} if word else {},
        }
    shape = LinearShape(*expected.shape)
    return load_linear(tensors, shape, where=path.stem, hints=FormatHints.from_json(declared)), expected


def vectors(folder: Path) -> list[Path]:
    return sorted([*folder.glob("exl2_*.safetensors"), *folder.glob("gptq_*.safetensors")])


@pytest.mark.parametrize("path", vectors(BUNDLED), ids=lambda path: path.stem)
def test_weights_of_the_bundled_vectors(path: Path, isa: str) -> None:
    w, expected = read_vector(path)
    assert torch.equal(w.dequantize(), expected.float())
    check_codes(w)


def test_weights_of_all_vectors(shared: Path) -> None:
    paths = vectors(shared / "vectors")
    assert len(paths) > 60
    for path in paths:
        check_codes(read_vector(path)[0])


def test_subnormal_scales_survive(isa: str) -> None:
    tensors = exl2_tensors([(8, 32), (4, 32)], 32)
    tensors["q_scale_max"] = torch.tensor([1e-3, 2e-5]).half()
    w = load_linear(tensors, LinearShape(64, 32), where="m")
    weight = w.dequantize()
    assert 0 < weight[weight != 0].abs().min() < 2**-14
    check_codes(w)


def test_outliers_drown_only_their_own_span(isa: str) -> None:
    """x in the order of positions, one value in the first span 1000 times the others."""
    w = exl2([(4, 128), (4, 128)], 48, permuted=False)
    weight, kernel = unrounded(w), build(w)
    x = random(4, 256)
    x[:, 5] *= 1000
    expected, y = x.double() @ weight, kernel(x)
    # Of the outlier's own product the errors of the 127 others are sqrt(127) / sqrt(12) / 127 / 256.
    assert error(y, expected) < 2e-4
    largest = x[:, :128].abs().amax(dim=1, keepdim=True).double()
    bound = largest / 127 / 256 * weight[:128].abs().sum(0) + EXACT * (x[:, 128:].double() @ weight[128:]).norm()
    assert ((y.double() - expected).abs() <= bound).all()
    x[:, :128] = 0
    assert error(kernel(x), x.double() @ weight) < EXACT


def test_zeros_and_next_to_nothing(isa: str) -> None:
    w = exl2(EVERY_WIDTH, 32)
    kernel, x = build(w), random(3, 320)
    x[1] = 0
    x[2] *= 1e-33
    y = kernel(x)
    assert torch.equal(y[1:], torch.zeros(2, 32)) and not torch.signbit(y[1]).any()
    x[2] *= 1e25
    assert error(kernel(x)[2:], x[2:].double() @ unrounded(w)) < EXACT
    huge = x[:1].sign() * 3e38
    small = exl2([(4, 64)], 32)
    assert kernel(huge).shape == (1, 32) and not build(small)(x[:1, :64] * 1e30).isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_stay_in_their_row(bad: float, isa: str) -> None:
    for w in (exl2(EVERY_WIDTH, 32), gptq(4, 40, 32, 8, act_order=False)):
        kernel, x = build(w), random(7, w.shape.in_features)
        clean = kernel(x)
        x[3, 5] = bad
        y = kernel(x)
        assert y[3].isnan().all()
        assert same_bits(torch.cat([y[:3], y[4:]]), torch.cat([clean[:3], clean[4:]]))


def test_the_residual_is_for_batches_up_to_its_number() -> None:
    w, x = exl2(EVERY_WIDTH, 32), random(9, 320)
    exact, plain, few = build(w)(x), build(w, Residual.NEVER)(x), build(w, Residual.FEW)
    assert not torch.equal(exact, plain)
    assert same_bits(few(x), plain) and same_bits(few(x[:8]), exact[:8])


@pytest.fixture
def family() -> Iterator[list[PackedCpu]]:
    same = exl2_tensors([(4, 128), (3, 192)], 64)
    other = {**exl2_tensors([(5, 128), (2, 192)], 33, seed=1), "q_invperm": same["q_invperm"]}
    yield [
        build(load_linear(same, LinearShape(320, 64), where="m")),
        build(load_linear(other, LinearShape(320, 33), where="m")),  # the same order of inputs, other widths
        build(exl2(EVERY_WIDTH, 96, seed=2)),
        build(gptq(4, 320, 32, 64, act_order=False)),
    ]


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_matrices_multiplied_together(family: list[PackedCpu], rows: int, isa: str) -> None:
    x = random(rows, 320)
    together = multiply_together(family, x)
    assert all(same_bits(y, kernel(x)) for y, kernel in zip(together, family, strict=True))
    deep = multiply_together(family[:2], x.view(rows, 1, 320).half())
    assert deep[1].shape == (rows, 1, 33) and deep[1].dtype == torch.float16
    mixed = [family[0], select.select(load_linear(dense_tensors(320, 8), LinearShape(320, 8), where="m"), CPU)]
    assert all(same_bits(y, kernel(x)) for y, kernel in zip(multiply_together(mixed, x), mixed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_shape_and_dtype_come_back(dtype: torch.dtype) -> None:
    w = exl2(EVERY_WIDTH, 33)
    x = random(2, 3, 640, seed=3).to(dtype)[..., ::2]
    y = build(w)(x)
    assert y.shape == (2, 3, 33)
    assert torch.equal(y, build(w)(x.float().reshape(6, 320)).to(dtype).view(2, 3, 33))


def test_the_weights_are_copied_or_left_alone() -> None:
    tensors = exl2_tensors(EVERY_WIDTH, 32)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    w = load_linear(tensors, LinearShape(320, 32), where="m")
    first, second = build(w), build(w)
    x = random(2, 320)
    assert same_bits(first(x), second(x))
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("w", [exl2([(4, 2048)], 256), symmetric(4, 2048, 256, 128), gptq(4, 2048, 256, 128, False)])
def test_storage_is_about_the_size_on_disk(w: QuantFormat) -> None:
    assert build(w).storage_bytes == pytest.approx(w.storage_bits() / 8, rel=0.06)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-64].contiguous(), "what pack_tiles made"),
        (lambda t: t[:40].contiguous(), "what pack_tiles made"),
        (lambda t: torch.zeros_like(t), "what pack_tiles made"),
        (lambda t: t.to(torch.int32), "dtype Byte"),
    ],
)
def test_the_binding_refuses_other_memory(change: object, message: str) -> None:
    packed, x = build(exl2(EVERY_WIDTH, 32)).packed, random(1, 320)
    for call in (native.ops().linear_packed, lambda x, w, n: native.ops().linear_packed_many(x, [w], n)):
        with pytest.raises(RuntimeError, match=message):
            call(x, change(packed), 0)
        with pytest.raises(RuntimeError, match="x must have shape"):
            call(x[:, 1:].contiguous(), packed, 0)
        with pytest.raises(RuntimeError, match="dtype Float"):
            call(x.double(), packed, 0)
    with pytest.raises(RuntimeError, match="1 to 8 weights"):
        native.ops().linear_packed_many(x, [], 0)


ARGUMENTS = {
    "words": torch.zeros(4, 8, dtype=torch.int32),
    "spans": torch.tensor([[4, 0, 1]], dtype=torch.int32),
    "order": torch.arange(32, dtype=torch.int32),
    "rows": torch.arange(32, dtype=torch.int32),
    "scales": torch.zeros(1, 8, dtype=torch.float16),
    "tables": None,
    "zeros": None,
    "zero_base": 0,
    "inputs": 32,
    "outputs": 8,
    "out": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.full((32,), 32, dtype=torch.int32)}, r"order\[0\] is 32 of 32"),
        ({"rows": torch.full((32,), -2, dtype=torch.int32)}, r"rows\[0\] is -2 of 32"),
        ({"order": torch.zeros(31, dtype=torch.int32)}, "order must have shape"),
        ({"order": None, "words": torch.zeros(5, 8, dtype=torch.int32)}, "128 bits of 160"),
        ({"spans": torch.tensor([[7, 0, 1]], dtype=torch.int32)}, "span 0 is"),
        ({"spans": torch.tensor([[4, 1, 1]], dtype=torch.int32)}, "span 0 is"),
        ({"spans": torch.tensor([[4, 0, 5]], dtype=torch.int32)}, "span 0 is"),
        ({"rows": None, "inputs": 31}, "32 positions for 31 inputs"),
        ({"outputs": 9}, "32 x 9"),
        ({"scales": torch.zeros(1, 7, dtype=torch.float16)}, "scales must have shape"),
        ({"scales": torch.zeros(1, 8)}, "dtype Half"),
        ({"zeros": torch.zeros(1, 7, dtype=torch.uint8)}, "zeros must have shape"),
        ({"out": torch.zeros(64, dtype=torch.uint8)}, "out must have shape"),
    ],
)
def test_packing_refuses_what_would_read_or_write_outside(change: dict[str, object], message: str) -> None:
    assert native.ops().pack_tiles(*ARGUMENTS.values()) > 0
    with pytest.raises(RuntimeError, match=message):
        native.ops().pack_tiles(*{**ARGUMENTS, **change}.values())


def test_spans_are_whole_groups_cut_at_128() -> None:
    runs = [type("Run", (), {"bits": 4, "positions": n})() for n in (32, 160, 128)]
    assert span_table(runs).tolist() == [[4, 0, 1], [4, 1, 4], [4, 1, 1], [4, 2, 4]]
