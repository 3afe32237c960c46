"""Which code attends to a prompt, and that every one of them gives the same result within the stated bound."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_cases import Case

from exl_runtime.ops.attention import choose, cuda, flash, sdpa

CUDA = torch.device("cuda")
SHAPES = {
    "whole": {"sequences": [(70, 70)]},
    "ragged": {"sequences": [(33, 200), (17, 17), (1, 40), (0, 3)], "page": 16},
    "pages of 256": {"sequences": [(20, 300), (25, 40)], "page": 256, "head_dim": 32},
    "window": {"sequences": [(60, 170), (2, 90)], "heads": 3, "kv_heads": 1, "window": 50},
}


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_table: torch.Tensor | None,
) -> torch.Tensor:
    """flash-attn 2.7's function of this name, as its documentation defines it, in float64."""
    assert causal and q.dtype == k.dtype == v.dtype
    out = torch.empty_like(q)
    for s in range(len(cu_seqlens_q) - 1):
        (start, stop), (low, high) = cu_seqlens_q[s : s + 2].tolist(), cu_seqlens_k[s : s + 2].tolist()
        rows, length = stop - start, high - low
        assert rows <= max_seqlen_q and length <= max_seqlen_k
        if block_table is None:
            keys, values = k[low:high], v[low:high]
        else:
            assert k.shape[1] % 256 == 0  # or flash-attn refuses
            held = block_table[s, : -(-length // k.shape[1])].long()
            keys, values = (x[held].flatten(0, 1)[:length] for x in (k, v))
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("thd,jhd->htj", q[start:stop].double(), keys) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(rows)[:, None] + length - rows
        distance = place - torch.arange(length)
        hidden = (distance < 0) | (distance > (window_size[0] if window_size[0] >= 0 else length))
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        out[start:stop] = torch.einsum("htj,jhd->thd", weights, values).to(q.dtype)
    return out


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flash-attn that computes what the real one documents."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.__spec__ = SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def near(out: torch.Tensor, case: Case) -> None:
    exact = case.dense(halves=False)
    bound = choose.PREFILL_BOUND / 2 * case.wide[1].abs().max().item()
    worst = (out.double().cpu() - exact).abs().max().item()
    assert worst <= bound, f"max error {worst:.3g} > {bound:.3g}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_torch_and_our_own_agree(emulated, shape: dict) -> None:
    case = Case(**shape)
    near(sdpa.prefill(*case.arguments()), case)
    near(cuda.paged_attention(*case.arguments()), case)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_flash_attn_is_asked_for_the_same(flash_attn: None, shape: dict, softcap: float | None) -> None:
    """Wiring only: the arguments mean what flash-attn's documentation says. Hardware: test_all_agree_on_a_card."""
    case = Case(**shape, softcap=softcap)
    near(flash.prefill(*case.arguments()), case)


@pytest.mark.parametrize("name", ["flash", "sdpa"])
def test_a_mixed_batch_keeps_the_bits_of_decoding(
    emulated, flash_attn: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Prompts by another code, short sequences by our decode kernel all the same."""
    monkeypatch.setattr(cuda, "choose_prefill", lambda *args, **kwargs: choose.Choice(name, "test"))
    case = Case([(1, 140), (40, 60), (16, 30)])
    out = cuda.paged_attention(*case.arguments())
    near(out, case)
    first, _, last = case.parts(64)
    assert torch.equal(out[:1], cuda.paged_attention(*first.arguments()))
    assert torch.equal(out[-16:], cuda.paged_attention(*last.arguments()))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_all_agree_on_a_card(card, shape: dict) -> None:
    if card.emulated:
        pytest.skip("flash-attn needs a card")
    case = Case(**shape, device=card.device)
    near(sdpa.prefill(*case.arguments()), case)
    if choose._flash_missing(card.device) is None:
        near(flash.prefill(*case.arguments()), case)


def pages(dtype: torch.dtype = torch.float16, page: int = 256, row: int = 64) -> torch.Tensor:
    return torch.empty(0, page, 2, row, dtype=dtype)


@pytest.mark.parametrize(
    ("installed", "held", "others", "name", "reason"),
    [
        (True, pages(), {}, "flash", "over pages"),
        (True, pages(), {"window": 9, "softcap": 1.0}, "flash", "over pages"),
        (True, pages(page=64), {}, "flash", "over gathered keys"),
        (True, pages(torch.bfloat16), {}, "sdpa", "narrow queries"),
        (True, pages(torch.uint8, row=36), {}, "own", "reads codes"),
        (False, pages(), {}, "sdpa", "flash-attn is not installed"),
        (False, pages(), {"softcap": 1.0}, "own", "torch has no softcap"),
        (False, pages(), {"window": 9}, "own", "mask"),
        (False, pages(torch.float32), {}, "reference", "torch.float32"),
        (False, pages(page=48), {}, "reference", "not of 48"),
    ],
)
def test_the_choice_and_its_reason(
    monkeypatch: pytest.MonkeyPatch, installed: bool, held: torch.Tensor, others: dict, name: str, reason: str
) -> None:
    monkeypatch.setattr(choose, "_flash_missing", lambda device: None if installed else "flash-attn is not installed")
    said = choose.describe(CUDA, head_dim=64, pages=held, **others)
    assert said["prefill"].name == name and reason in said["prefill"].reason
    assert (said["decode"].name == "reference") == (name == "reference")


def test_why_flash_attn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    choose._flash_missing.cache_clear()
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    assert choose._flash_missing(CUDA) == "flash-attn is not installed"
    choose._flash_missing.cache_clear()
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Ampere" in choose._flash_missing(CUDA)
    choose._flash_missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "does not load" in choose._flash_missing(CUDA)
    choose._flash_missing.cache_clear()
