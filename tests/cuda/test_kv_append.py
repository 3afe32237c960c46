"""Rotating, rounding and quantizing new keys and values on CUDA: the bits of the plain torch reference."""

import pytest
import torch
from oracles import same_bits

from exl_runtime.ops import kv_append, kv_cuda, kv_quant
from exl_runtime.ops import rope as reference

HEAD_DIMS = (1, 8, 16, 20, 33, 64, 80, 96, 128, 256)
WIDTHS = list(kv_quant.BITS)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian values of very different sizes, with outlier channels."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * torch.randn(*shape[:-1], 1, generator=random).exp()
    x[..., shape[-1] // 2] *= 20
    return x


def angles(tokens: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = reference.frequencies(kind="default", theta=10000.0, rotary_dim=rotary_dim)
    return reference.cos_sin(frequencies, torch.arange(tokens) * 377, 1.1)


def new_pages(head_dim: int, kind: torch.dtype | tuple[int, int], kv_heads: int = 3) -> list[torch.Tensor]:
    if isinstance(kind, torch.dtype):
        return [torch.full((2, 8, kv_heads, head_dim), 7.0).to(kind) for _ in "kv"]
    rows = [kv_quant.row_bytes(head_dim, bits) for bits in kind]
    return [torch.full((2, 8, kv_heads, length), 7, dtype=torch.uint8) for length in rows]


SLOTS = torch.tensor([3, 15, 0, 8, 7])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_append_equals_the_reference_to_the_bit(card, head_dim: int) -> None:
    for n, (key_bits, value_bits) in enumerate(zip(WIDTHS, reversed(WIDTHS), strict=True)):
        k, v = (heads(5, 3, head_dim, seed=seed).to(FLOATS[n % 3]) for seed in (1, 2))
        k[1, 0], v[2, 1, 0] = 0.0, float("nan")
        wanted = new_pages(head_dim, (key_bits, value_bits))
        pages = [p.to(card.device) for p in wanted]
        kv_append.append_kv(k, v, *wanted, SLOTS)
        kv_cuda.append_kv(*card.on(k, v), *pages, *card.on(SLOTS))
        for got, want, bits in zip(pages, wanted, (key_bits, value_bits), strict=True):
            nan = kv_quant.unpack(want, head_dim, bits)[1].isnan().any(-1)
            assert torch.equal(got.cpu()[~nan], want[~nan]), f"{bits} bits"
            assert torch.equal(nan, kv_quant.unpack(got.cpu(), head_dim, bits)[1].isnan().any(-1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("held", FLOATS)
def test_append_rounds_as_torch_does(card, dtype: torch.dtype, held: torch.dtype) -> None:
    k, v = (heads(5, 3, 20, seed=seed).to(dtype) for seed in (1, 2))
    k[0, 0, 0] = 1e30  # infinite in half
    wanted = new_pages(20, held)
    pages = [p.to(card.device) for p in wanted]
    kv_append.append_kv(k, v, *wanted, SLOTS)
    kv_cuda.append_kv(*card.on(k, v), *pages, *card.on(SLOTS))
    assert all(same_bits(got.cpu(), want) for got, want in zip(pages, wanted, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (128, 96), (2, 2), (20, 0)])
def test_rope_equals_the_reference_to_the_bit(card, dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    fused = heads(7, 6 * head_dim).to(dtype)  # 4 heads of queries beside 2 of keys
    cos, sin = angles(7, rotary_dim)
    wanted = reference.rope(
        fused[:, : 4 * head_dim].view(7, 4, head_dim), fused[:, 4 * head_dim :].view(7, 2, head_dim), cos, sin
    )
    (moved,) = card.on(fused.clone())
    q, k = moved[:, : 4 * head_dim].view(7, 4, head_dim), moved[:, 4 * head_dim :].view(7, 2, head_dim)
    out = kv_cuda.rope(q, k, *card.on(cos, sin))
    assert out[0] is q and out[1] is k
    assert all(same_bits(got.cpu(), want) for got, want in zip(out, wanted, strict=True))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, (4, 4), (8, 3)])
def test_one_launch_does_both(card, kind: torch.dtype | tuple[int, int]) -> None:
    """Rotation and storing together give the bits of one after the other, in every order; the keys stay as they are."""
    fused = heads(5, (4 + 2 + 2) * 64).half()
    cos, sin = angles(5, 64)
    parts = [fused[:, :256].view(5, 4, 64), fused[:, 256:384].view(5, 2, 64), fused[:, 384:].view(5, 2, 64)]
    wanted_q, rotated = reference.rope(*parts[:2], cos, sin)
    wanted = new_pages(64, kind, 2)
    kv_append.append_kv(rotated, parts[2], *wanted, SLOTS)
    angles_there = card.on(cos, sin)

    def run() -> list[torch.Tensor]:
        (moved,) = card.on(fused.clone())
        q, k, v = (moved[:, a:b].view(5, -1, 64) for a, b in ((0, 256), (256, 384), (384, 512)))
        pages = [p.to(card.device, copy=True) for p in new_pages(64, kind, 2)]
        q = kv_cuda.rope_append(q, k, v, *angles_there, *pages, *card.on(SLOTS))
        return [q, k, *pages]

    q, k, *pages = card.every_order(run)
    assert same_bits(q, wanted_q) and same_bits(k, parts[1].contiguous())
    assert all(torch.equal(got, want) for got, want in zip(pages, wanted, strict=True))


def test_a_slot_outside_is_not_written(card) -> None:
    k, v, slots = card.on(heads(3, 3, 32), heads(3, 3, 32), torch.tensor([-1, 16, 2]))
    pages = [p.to(card.device) for p in new_pages(32, (4, 4))]
    kv_cuda.append_kv(k, v, *pages, slots)
    for held, x in zip(pages, (k, v), strict=True):
        assert torch.equal(held[0, 2].cpu(), kv_quant.quantize(x[2].cpu(), 4))
        held[0, 2] = 7
        assert (held == 7).all()


def test_nothing_to_do(card) -> None:
    k, cos = torch.zeros(0, 3, 32, device=card.device), torch.zeros(0, 16, device=card.device)
    pages = [p.to(card.device) for p in new_pages(32, (4, 4))]
    kv_cuda.append_kv(k, k, *pages, torch.zeros(0, dtype=torch.long, device=card.device))
    assert kv_cuda.rope(k, k, cos, cos)[0].shape == (0, 3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_pages": 17}, "rows of 17 bytes in v_pages hold no quantized head of 32 values"),
        ({"k": 31, "cos": 15}, "v must have shape"),
        ({"slots": 2}, "3 tokens but 2 slots"),
        ({"cos": 20}, "head_dim of q must be at least 40"),
    ],
)
def test_the_binding_refuses_what_does_not_fit(card, change: dict[str, int], message: str) -> None:
    size = {"k": 32, "v_pages": 18, "slots": 3, "cos": 16, **change}
    q, v = torch.zeros(3, 2, size["k"]), torch.zeros(3, 2, 32)
    k, cos, slots = torch.zeros(3, 2, size["k"]), torch.zeros(3, size["cos"]), torch.arange(size["slots"])
    k_pages, v_pages = (torch.zeros(1, 8, 2, n, dtype=torch.uint8) for n in (18, size["v_pages"]))
    with pytest.raises(RuntimeError, match=message):
        kv_cuda.rope_append(*card.on(q, k, v, cos, cos, k_pages, v_pages, slots))
