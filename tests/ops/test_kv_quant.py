"""Quantized keys and values: the format's vectors, the native kernels, and attention that reads the codes."""

from copy import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_as_good_as, same_bits
from safetensors.torch import load_file

from exl_runtime.ops import cpu_small, kv_append, kv_quant, native
from exl_runtime.ops.attention import cpu, reference

HEAD_DIMS = (1, 8, 16, 20, 32, 33, 64, 80, 96, 120, 128, 256)
WIDTHS = list(kv_quant.BITS)


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian values of very different sizes, with outlier channels."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * torch.randn(*shape[:-1], 1, generator=random).exp()
    x[..., shape[-1] // 2] *= 20
    return x


# The definition


def fields_of(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in the packed groups of exllamav3: planes of 32 codes, the highest bits first."""
    streams = words.long() & 0xFFFFFFFF
    fields, start, below = torch.zeros(len(words), 32, dtype=torch.long), 0, bits
    for width in (8, 4, 2, 1):
        if bits & width:
            below -= width
            for j in range(32):
                word = streams[:, start + j * width // 32]
                fields[:, j] |= (word >> j * width % 32 & (1 << width) - 1) << below
            start += width
    return fields


@pytest.mark.parametrize("bits", WIDTHS)
def test_against_the_vectors_of_the_format(bits: int, shared) -> None:
    vector = load_file(shared / "vectors" / f"cache_exl3_b{bits}.safetensors")
    codes, scales = kv_quant.encode(vector["input"].view(-1, 32), bits)
    assert torch.equal(codes.long(), fields_of(vector["words"], bits))
    assert same_bits(scales.flatten(), vector["scales"])
    assert same_bits(kv_quant.decode(codes, scales, bits).half().flatten(), vector["expected"])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_orthonormal_and_its_own_inverse(head_dim: int) -> None:
    matrix = kv_quant.rotate(torch.eye(head_dim))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix, matrix.T)
    sizes = [size for _, size in kv_quant.blocks_of(head_dim)]
    assert sum(sizes) == head_dim and sizes == sorted(sizes, reverse=True) and sizes[0] <= 32
    for start, size in kv_quant.blocks_of(head_dim):
        block = matrix[start : start + size, start : start + size] * size**0.5
        torch.testing.assert_close(block.abs(), torch.ones(size, size))
        assert (matrix[start : start + size].count_nonzero(-1) == size).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_pack_and_unpack(head_dim: int, bits: int) -> None:
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 5, head_dim), generator=random).to(torch.uint8)
    scales = torch.randn(3, 5, -(-head_dim // 32), generator=random).half()
    rows = kv_quant.pack(codes, scales, bits)
    assert rows.shape == (3, 5, kv_quant.row_bytes(head_dim, bits)) and rows.dtype == torch.uint8
    assert kv_quant.bits_of(rows, head_dim) == bits
    again = kv_quant.unpack(rows, head_dim, bits)
    assert torch.equal(again[0], codes) and same_bits(again[1], scales)


def test_a_row_by_hand() -> None:
    """One step of 6 bits: codes 0 to 15 times 4 plus 1, behind a scale of 1.0."""
    codes = torch.arange(16, dtype=torch.uint8) * 4 + 1
    row = kv_quant.pack(codes, torch.ones(1).half(), 6).tolist()
    assert row[:2] == [0x00, 0x3C]
    assert row[2:10] == [0x20, 0x64, 0xA8, 0xEC, 0x31, 0x75, 0xB9, 0xFD]  # even codes, then odd ones
    assert row[10:] == [0x55] * 4  # the low two bits, 01 each


def test_rows_that_fit_no_width_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 30 bytes hold no quantized head of 64 values"):
        kv_quant.bits_of(torch.zeros(2, 30), 64)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_of_gaussian_data_is_the_published_one(bits: int) -> None:
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    error = (kv_quant.dequantize(kv_quant.quantize(x, bits), 64, bits) - x).norm() / x.norm()
    published = {2: 0.36, 3: 0.18, 4: 0.087, 5: 0.042, 6: 0.022, 7: 0.011, 8: 0.0055}
    assert error == pytest.approx(published[bits], rel=0.08)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_value_is_off_by_more_than_half_a_step(bits: int) -> None:
    x = heads(200, 80)
    rotated = kv_quant.rotate(x).double()
    again = kv_quant.rotate(kv_quant.dequantize(kv_quant.quantize(x, bits), 80, bits)).double()
    for group, restored in zip(rotated.split(32, -1), again.split(32, -1), strict=True):
        most = group.abs().amax(-1, keepdim=True)  # the scale, rounded to 11 bits, and float32 rounding beside it
        assert ((group - restored).abs() <= most * (0.5**bits + 2.0**-11 + 1e-5)).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_zeros_stay_zeros_and_nan_is_not_hidden(bits: int) -> None:
    x = heads(3, 64)
    x[0], x[1, 40] = 0.0, float("nan")
    again = kv_quant.dequantize(kv_quant.quantize(x, bits), 64, bits)
    assert not again[0].any() and again[1, 32:].isnan().all() and again[2].isfinite().all()


# Appending


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_append_equals_the_reference_to_the_bit(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    for key_bits, value_bits in zip(WIDTHS, reversed(WIDTHS), strict=True):
        k, v = (heads(5, 3, head_dim, seed=seed).to(dtype) for seed in (1, 2))
        k[1, 0], v[2, 1, 0] = 0.0, float("nan")
        pages = [
            torch.full((2, 8, 3, kv_quant.row_bytes(head_dim, bits)), 7, dtype=torch.uint8)
            for bits in (key_bits, value_bits)
        ]
        wanted = [p.clone() for p in pages]
        slots = torch.tensor([3, 15, 0, 8, 7])
        kv_append.append_kv(k, v, *wanted, slots)
        cpu_small.append_kv(k, v, *pages, slots)
        for got, want, bits in zip(pages, wanted, (key_bits, value_bits), strict=True):
            nan = kv_quant.unpack(want, head_dim, bits)[1].isnan().any(-1)
            assert torch.equal(got[~nan], want[~nan]), f"{bits} bits"
            assert torch.equal(nan, kv_quant.unpack(got, head_dim, bits)[1].isnan().any(-1))


@pytest.mark.usefixtures("kernels")
def test_append_takes_slices_of_a_fused_projection() -> None:
    fused = heads(6, (4 + 2 + 2) * 32)
    k, v = fused[:, 128:192].view(6, 2, 32), fused[:, 192:].view(6, 2, 32)
    pages = torch.zeros(1, 8, 2, kv_quant.row_bytes(32, 4), dtype=torch.uint8)
    k_pages, v_pages = pages.clone(), pages.clone()
    cpu_small.append_kv(k, v, k_pages, v_pages, torch.arange(6))
    assert torch.equal(k_pages[0, :6], kv_quant.quantize(k, 4)) and torch.equal(v_pages[0, :6], kv_quant.quantize(v, 4))


@pytest.mark.usefixtures("kernels")
def test_append_refuses_what_does_not_fit() -> None:
    x, pages = torch.ones(1, 2, 32), torch.zeros(1, 8, 2, 18, dtype=torch.uint8)
    slot = torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="rows of 17 bytes in v_pages hold no quantized head of 32 values"):
        cpu_small.append_kv(x, x, pages, pages[..., :17].contiguous(), slot)
    with pytest.raises(RuntimeError, match=r"slots\[0\] is 8"):
        cpu_small.append_kv(x, x, pages, pages.clone(), slot + 8)
    assert not pages.any()


# Attention


class Case:
    """One ragged batch over scattered quantized pages. `sequences`: (new tokens, keys in all)."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        bits: tuple[int, int] = (4, 4),
        *,
        heads_: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        page: int = 256,
        window: int | None = None,
        softcap: float | None = None,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        counts = [-(-length // page) for _, length in sequences]
        order = torch.randperm(sum(counts) + 1, generator=random)
        self.float_pages, self.code_pages = [], []
        for number, width in enumerate(bits):
            rows = kv_quant.quantize(heads(len(order), page, kv_heads, head_dim, seed=seed + number) / 3, width)
            self.code_pages.append(rows)
            self.float_pages.append(kv_quant.dequantize(rows, head_dim, width))
        self.pages = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
        for s, pages in enumerate(order.split([*counts, 1])[:-1]):
            self.pages[s, : counts[s]] = pages
        self.sequences = sequences
        self.q = torch.randn(sum(new for new, _ in sequences), heads_, head_dim, generator=random)
        self.rest = (head_dim**-0.5, window, softcap)

    def run(self, attention, pages: list[torch.Tensor], q: torch.Tensor | None = None) -> torch.Tensor:
        starts = torch.tensor([0, *(new for new, _ in self.sequences)]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([length for _, length in self.sequences], dtype=torch.int32)
        return attention(self.q if q is None else q, *pages, starts, lengths, self.pages, *self.rest)

    def check(self, attention) -> None:
        """Codes read by `attention` against the same numbers in float64."""
        exact = self.run(reference.paged_attention, self.float_pages)  # float32: the naive result
        oracle = self.dense()
        assert_as_good_as(self.run(attention, self.code_pages), exact, oracle, factor=4, floor=2e-6)

    def dense(self) -> torch.Tensor:
        out, row, (scale, window, softcap) = [], 0, self.rest
        for s, (new, length) in enumerate(self.sequences):
            page = self.float_pages[0].shape[1]
            held = self.pages[s, : -(-length // page)].long()
            group = self.q.shape[1] // self.float_pages[0].shape[2]
            k, v = (p[held].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for p in self.float_pages)
            scores = torch.einsum("thd,jhd->htj", self.q[row : row + new].double(), k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(length - new, length)[:, None] - torch.arange(length)
            hidden = (distance < 0) | (distance >= (window or length))
            out.append(torch.einsum("htj,jhd->thd", torch.softmax(scores.masked_fill(hidden, float("-inf")), -1), v))
            row += new
        return torch.cat(out)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_reference_reads_codes(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SPAN", 100)
    for bits in zip(WIDTHS, reversed(WIDTHS), strict=True):
        Case([(3, 260), (1, 7)], bits, head_dim=head_dim, window=201).check(reference.paged_attention)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_kernel_reads_codes_of_all_widths(isa: str, head_dim: int) -> None:
    for bits in zip(WIDTHS, reversed(WIDTHS), strict=True):
        Case([(3, 130), (1, 9)], bits, head_dim=head_dim).check(cpu.paged_attention)


SHAPES = {
    "one token": {"sequences": [(1, 1)]},
    "page edges": {"sequences": [(1, 255), (1, 256), (2, 257), (1, 513)]},
    "small pages, window": {"sequences": [(33, 60), (1, 100)], "page": 16, "window": 30, "head_dim": 48},
    "window of one": {"sequences": [(5, 260)], "window": 1},
    "prefill": {"sequences": [(90, 300)], "heads_": 8, "head_dim": 128, "bits": (8, 8)},
    "many heads to one key": {"sequences": [(1, 300), (7, 40)], "heads_": 7, "kv_heads": 1, "bits": (6, 4)},
    "a key for every head": {"sequences": [(1, 300)], "heads_": 3, "kv_heads": 3, "bits": (3, 5), "head_dim": 80},
    "softcap": {"sequences": [(30, 290)], "softcap": 3.0, "bits": (5, 2)},
    "large heads": {"sequences": [(4, 70)], "heads_": 2, "kv_heads": 1, "head_dim": 512, "bits": (7, 7)},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_kernel_on_every_shape(isa: str, shape: dict) -> None:
    Case(**shape).check(cpu.paged_attention)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_kernel_on_random_shapes(kernels: None, data: st.DataObject) -> None:
    sequences = data.draw(
        st.lists(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, min(n, 40)), st.just(n))), min_size=1,
                 max_size=3)
    )  # fmt: skip
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    Case(
        sequences,
        (data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8))),
        heads_=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=data.draw(st.integers(1, 140)),
        page=data.draw(st.sampled_from([1, 7, 16, 256])),
        window=data.draw(st.none() | st.integers(1, 320)),
        softcap=data.draw(st.none() | st.floats(0.5, 60)),
        seed=data.draw(st.integers(0, 1000)),
    ).check(cpu.paged_attention)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (6, 3)])
def test_pieces_threads_and_instruction_sets_do_not_matter(bits: tuple[int, int], restore: None) -> None:
    """One prefill, token by token, in a batch: the same bits; and on AVX2 and AVX-512."""
    seen = []
    for name in ("avx2", "avx512"):
        try:
            native.ops().set_isa(name)
        except RuntimeError as err:
            pytest.skip(str(err))
        for threads in (1, 3):
            native.ops().set_threads(threads)
            case = Case([(40, 300), (12, 12)], bits, heads_=6, head_dim=80)
            seen.append(case.run(cpu.paged_attention, case.code_pages))
            single, row = [], 0
            for s, (new, length) in enumerate(case.sequences):
                for i in range(new):
                    one = copy(case)
                    one.sequences, one.pages = [(1, length - new + i + 1)], case.pages[s : s + 1]
                    single.append(one.run(cpu.paged_attention, case.code_pages, case.q[row : row + 1]))
                    row += 1
            seen.append(torch.cat(single))
    assert all(same_bits(seen[0], other) for other in seen[1:])


def test_the_kernel_refuses_rows_of_no_width(kernels: None) -> None:
    case = Case([(2, 9)])
    wrong = case.code_pages[0][..., :-1].contiguous()
    with pytest.raises(RuntimeError, match="rows of 35 and 36 bytes hold no quantized heads of 64 values"):
        case.run(cpu.paged_attention, [wrong, case.code_pages[1]])
    with pytest.raises(RuntimeError, match="v_pages must be"):
        case.run(cpu.paged_attention, [case.code_pages[0], case.float_pages[1]])


def test_a_nan_key_reaches_its_heads_only(isa: str) -> None:
    case = Case([(2, 40)], heads_=2, kv_heads=2)
    scales = torch.tensor([float("nan")]).half().view(torch.uint8)
    case.code_pages[0][case.pages[0, 0], 7, 1, :2] = scales
    out = case.run(cpu.paged_attention, case.code_pages)
    assert out[:, 1].isnan().all() and out[:, 0].isfinite().all()
