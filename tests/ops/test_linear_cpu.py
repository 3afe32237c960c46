"""The native matrix kernels: the format's weights bit for bit, float32 accuracy, the same bits in any batch."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import dense_tensors, exl2_tensors, gptq_tensors
from oracles import assert_as_good_as, same_bits
from safetensors import safe_open

from exl_runtime.formats import FormatHints, LinearShape, load_linear
from exl_runtime.formats.base import QuantFormat
from exl_runtime.formats.bits import pack_rows
from exl_runtime.ops import native
from exl_runtime.ops.linear import select, tiles
from exl_runtime.ops.linear.base import LinearKernel
from exl_runtime.ops.linear.dense_cpu import DenseCpu
from exl_runtime.ops.linear.exl2_cpu import Exl2Cpu
from exl_runtime.ops.linear.gptq_cpu import GptqCpu

CPU = torch.device("cpu")
ROWS = [0, 1, 2, 3, 4, 5, 8, 17, 64, 100]
EVERY_WIDTH = [(8, 32), (6, 64), (5, 32), (4, 96), (3, 64), (2, 32)]  # K = 320
BUNDLED = Path(__file__).resolve().parent.parent / "data" / "vectors"


pytestmark = pytest.mark.usefixtures("kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exl2(layout: list[tuple[int, int]], outputs: int, permuted: bool = True) -> QuantFormat:
    shape = LinearShape(sum(rows for _, rows in layout), outputs)
    return load_linear(exl2_tensors(layout, outputs, permuted=permuted), shape, where="m")


def gptq(bits: int, inputs: int, outputs: int, group_size: int, act_order: bool) -> QuantFormat:
    tensors = gptq_tensors(bits, inputs, outputs, group_size, act_order=act_order)
    declared = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False}
    return load_linear(tensors, LinearShape(inputs, outputs), where="m", hints=FormatHints.from_json(declared))


def dense(inputs: int, outputs: int, dtype: torch.dtype) -> QuantFormat:
    return load_linear(dense_tensors(inputs, outputs, dtype), LinearShape(inputs, outputs), where="m")


MATRICES = {
    "exl2 every width": lambda: exl2(EVERY_WIDTH, 96),
    "exl2 odd columns, several blocks": lambda: exl2([(8, 128), (6, 128), (5, 64), (4, 256), (3, 64), (2, 512)], 33),
    "exl2 in order": lambda: exl2([(4, 64), (4, 32)], 160, permuted=False),
    "exl2 one group": lambda: exl2([(6, 32)], 32),
    "gptq 2 bit": lambda: gptq(2, 640, 96, 128, act_order=True),
    "gptq 3 bit": lambda: gptq(3, 640, 32, 64, act_order=False),
    "gptq 3 bit, odd groups": lambda: gptq(3, 96, 32, 20, act_order=True),
    "gptq 4 bit": lambda: gptq(4, 640, 160, 32, act_order=False),
    "gptq 4 bit, groups of 40, order": lambda: gptq(4, 640, 96, 40, act_order=True),
    "gptq 4 bit, rows not whole steps": lambda: gptq(4, 40, 40, 8, act_order=False),
    "gptq 8 bit, one group": lambda: gptq(8, 1056, 32, -1, act_order=True),
    "dense float32, one column": lambda: dense(32, 1, torch.float32),
    "dense float32": lambda: dense(640, 96, torch.float32),
    "dense float16, odd": lambda: dense(1037, 7, torch.float16),
    "dense bfloat16": lambda: dense(96, 160, torch.bfloat16),
}


@pytest.fixture(params=MATRICES.values(), ids=MATRICES.keys())
def matrix(request: pytest.FixtureRequest) -> QuantFormat:
    return request.param()


def build(w: QuantFormat) -> LinearKernel:
    kernel = select.select(w, CPU, "cpu")
    assert isinstance(kernel, {"exl2": Exl2Cpu, "gptq": GptqCpu, "dense": DenseCpu}[w.name])
    return kernel


def test_as_good_as_float32_and_independent_of_the_batch(matrix: QuantFormat, isa: str) -> None:
    kernel, weight = build(matrix), matrix.dequantize()
    x = random(100, weight.shape[0])
    whole = kernel(x)
    assert_as_good_as(whole, x @ weight, x.double() @ weight.double())
    for rows in ROWS:
        assert same_bits(kernel(x[:rows]), whole[:rows]), f"{rows} rows"
    assert same_bits(kernel(x[41:42]), whole[41:42])
    assert same_bits(kernel(x[50:53]), whole[50:53])


def test_avx2_equals_avx512(matrix: QuantFormat, restore: None) -> None:
    kernel, results = build(matrix), []
    x = random(19, matrix.shape.in_features)
    for name in ("avx2", "avx512"):
        try:
            native.ops().set_isa(name)
        except RuntimeError as err:
            pytest.skip(str(err))
        results.append([kernel(x[:rows]) for rows in (1, 2, 4, 19)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("outputs", [32, 4160])
def test_the_number_of_threads_does_not_matter(outputs: int, restore: None) -> None:
    for w in (exl2(EVERY_WIDTH, outputs), dense(320, outputs, torch.float16)):
        kernel, x, seen = build(w), random(400, 320), []
        for threads in (1, 2, 3, 7):
            native.ops().set_threads(threads)
            seen.append([kernel(x), kernel(x[:3]), kernel(x[:1])])
        for other in seen[1:]:
            assert all(same_bits(a, b) for a, b in zip(seen[0], other, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=8),
    blocks=st.lists(st.sampled_from([1, 2, 3, 4, 17]), min_size=8, max_size=8),
    outputs=st.integers(1, 70),
    rows=st.integers(0, 9),
)
def test_any_exl2_layout(widths: list[int], blocks: list[int], outputs: int, rows: int) -> None:
    layout = [(bits, 32 * count) for bits, count in zip(sorted(widths, reverse=True), blocks, strict=False)]
    w = exl2(layout, outputs)
    weight, x = w.dequantize(), random(rows, w.shape.in_features)
    assert_as_good_as(build(w)(x), x @ weight, x.double() @ weight.double())


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


def check_vector(path: Path) -> None:
    """Rows of the identity pick single weights: the sums have one term, so the result is the weight itself."""
    w, expected = read_vector(path)
    kernel = build(w)
    assert torch.equal(kernel(torch.eye(w.shape.in_features)), expected.float())
    picked = torch.zeros(1, w.shape.in_features)
    picked[0, 37] = 1.0
    assert torch.equal(kernel(picked), expected[37:38].float())


def vectors(folder: Path) -> list[Path]:
    return sorted([*folder.glob("exl2_*.safetensors"), *folder.glob("gptq_*.safetensors")])


@pytest.mark.parametrize("path", vectors(BUNDLED), ids=lambda path: path.stem)
def test_weights_of_the_bundled_vectors_bit_for_bit(path: Path, isa: str) -> None:
    check_vector(path)


def test_weights_of_all_vectors_bit_for_bit(shared: Path) -> None:
    paths = vectors(shared / "vectors")
    assert len(paths) > 60
    for path in paths:
        check_vector(path)


def test_subnormal_scales_survive(isa: str) -> None:
    tensors = exl2_tensors([(8, 32), (4, 32)], 32)
    tensors["q_scale_max"] = torch.tensor([1e-3, 2e-5]).half()
    w = load_linear(tensors, LinearShape(64, 32), where="m")
    weight = w.dequantize()
    assert 0 < weight[weight != 0].abs().min() < 2**-14
    assert torch.equal(build(w)(torch.eye(64)), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_shape_and_dtype_come_back(dtype: torch.dtype) -> None:
    w = exl2(EVERY_WIDTH, 33)
    x = random(2, 3, 640, seed=3).to(dtype)[..., ::2]
    y = build(w)(x)
    assert y.shape == (2, 3, 33)
    assert torch.equal(y, build(w)(x.float().reshape(6, 320)).to(dtype).view(2, 3, 33))


def test_non_finite_inputs_stay_in_their_row() -> None:
    for w in (exl2(EVERY_WIDTH, 32), gptq(4, 40, 32, 8, act_order=False)):
        x = random(7, w.shape.in_features)
        clean = build(w)(x)
        x[3, 5] = float("nan")
        y = build(w)(x)
        assert y[3].isnan().all()
        assert same_bits(torch.cat([y[:3], y[4:]]), torch.cat([clean[:3], clean[4:]]))


def test_the_weights_are_copied_or_left_alone() -> None:
    tensors = exl2_tensors(EVERY_WIDTH, 32)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    w = load_linear(tensors, LinearShape(320, 32), where="m")
    first, second = build(w), build(w)
    x = random(2, 320)
    assert same_bits(first(x), second(x))
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_storage_is_about_the_size_on_disk() -> None:
    w = exl2([(4, 2048)], 256)
    assert build(w).storage_bytes == pytest.approx(w.storage_bits() / 8, rel=0.06)


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    w = dense(32, 32, torch.float32)
    assert "not dense" in Exl2Cpu.refuses(w, CPU)
    assert "not dense" in GptqCpu.refuses(w, CPU)
    assert "not on meta" in DenseCpu.refuses(w, torch.device("meta"))
    assert DenseCpu.refuses(w, CPU) is None
    monkeypatch.setattr(native, "available", lambda: "no compiler")
    assert "no compiler" in DenseCpu.refuses(w, CPU)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("codes", lambda t: t[:-1], "codes must have"),
        ("rows", lambda t: t + 1, "rows holds"),
        ("rows", lambda t: t - 2, "rows holds"),
        ("spans", lambda t: t.index_fill(1, torch.tensor([0]), 7), "span 0"),
        ("spans", lambda t: t + torch.tensor([0, 99, 0], dtype=torch.int32), "span 0"),
        ("spans", lambda t: t[:1], "spans cover"),
        ("spans", lambda t: t.long(), "dtype Int"),
        ("x", lambda t: t.double(), "dtype Float"),
        ("maxima", lambda t: t[:-1], "maxima"),
    ],
)
def test_the_binding_refuses_what_would_read_outside(name: str, change: object, message: str) -> None:
    kernel = build(exl2(EVERY_WIDTH, 32))
    arguments = {
        "x": random(1, 320),
        **{key: getattr(kernel, f"_{key}") for key in ("codes", "scales", "maxima", "spans", "rows")},
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        native.ops().linear_exl2(*arguments.values(), 32)


def tiled(tile_buffer: torch.Tensor, outputs: int, bits: int) -> torch.Tensor:
    """uint8 (outputs, positions): the codes of a buffer of one region, bit by bit from its description."""
    tiles_count = -(-outputs // 4)
    steps = (
        tile_buffer[16:-16].view(tiles_count, -1, 4, 2 * bits).transpose(1, 2).reshape(4 * tiles_count, -1, 2 * bits)
    )
    weights = 2 ** torch.arange(8)
    stream = (steps[..., None] & weights.to(torch.uint8) > 0).reshape(steps.shape[0], -1, bits).long()
    return (stream * weights[:bits]).sum(-1).to(torch.uint8)[:outputs]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("outputs", [1, 5, 32, 70])
def test_codes_are_tiled_and_reordered(bits: int, outputs: int) -> None:
    codes = torch.randint(0, 1 << bits, (96, 70), generator=torch.Generator().manual_seed(bits))
    words = pack_rows(codes, bits)
    expected = codes[:, :outputs].t().to(torch.uint8)

    plain = tiles.CodeTiles(outputs, 4 * 96 * bits // 8)
    plain.append(words[: 32 * bits // 32], bits)  # in two regions
    plain.append(words[32 * bits // 32 :], bits)
    assert torch.equal(tiled(plain.buffer, outputs, bits), expected)

    order = torch.cat([torch.arange(95, -1, -1), torch.full((16,), -1)]).to(torch.int32)
    moved = tiles.CodeTiles(outputs, 4 * 112 * bits // 8)
    moved.append(words, bits, order)
    assert torch.equal(
        tiled(moved.buffer, outputs, bits), torch.cat([expected.flip(1), expected.new_zeros(outputs, 16)], 1)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.full((16,), 32, dtype=torch.int32)}, r"order\[0\] is 32 of 32"),
        ({"order": torch.zeros(17, dtype=torch.int32)}, "whole steps"),
        ({"filled": 1}, "do not fit"),
        ({"outputs": 9}, "9 outputs"),
        ({"bits": 7}, "7 bits"),
        ({"words": torch.zeros(3, 8, dtype=torch.int32), "bits": 5}, "whole codes"),
    ],
)
def test_tiling_refuses_what_would_write_outside(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "words": torch.zeros(4, 8, dtype=torch.int32),
        "order": None,
        "codes": torch.zeros(32 + 2 * 4 * 16, dtype=torch.uint8),
        "bits": 4,
        "outputs": 8,
        "filled": 0,
    }
    native.ops().fill_tiles(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        native.ops().fill_tiles(*{**arguments, **change}.values())
