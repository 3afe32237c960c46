"""The CUDA attention kernels against float64, and their promises: order, batch and split change no bit of decoding."""

import logging

import pytest
import torch
from attention_cases import Case
from oracles import assert_as_good_as, same_bits

from exl_runtime.ops import kv_quant
from exl_runtime.ops.attention import choose, cuda, reference

F16, BF16 = torch.float16, torch.bfloat16
DECODE = {
    "one token": {"sequences": [(1, 1)]},
    "ragged": {"sequences": [(1, 300), (1, 5), (0, 9), (1, 129)], "page": 256},
    "chunk edges": {"sequences": [(1, 127), (2, 128), (3, 129), (2, 257)], "head_dim": 32},
    "many columns": {"sequences": [(5, 150), (16, 16)], "heads": 6, "head_dim": 16},
    "wide group": {"sequences": [(1, 200)], "heads": 12, "kv_heads": 1, "head_dim": 128, "dtype": BF16},
    "window": {"sequences": [(3, 400), (1, 90)], "head_dim": 80, "window": 150, "heads": 7, "kv_heads": 7},
    "window of one": {"sequences": [(5, 140)], "window": 1, "dtype": BF16},
    "softcap": {"sequences": [(2, 200)], "head_dim": 96, "softcap": 3.0, "page": 16},
    "large heads": {"sequences": [(1, 140), (3, 60)], "heads": 2, "kv_heads": 1, "head_dim": 256, "dtype": BF16},
    "longer band": {"sequences": [(1, 2100)], "heads": 2, "kv_heads": 1, "head_dim": 16, "page": 256},
    "4 bits": {"sequences": [(1, 300), (2, 16)], "head_dim": 128, "bits": (4, 4), "page": 256},
    "codes, window, softcap": {"sequences": [(4, 280)], "bits": (8, 3), "window": 140, "softcap": 20.0},
    "codes of odd groups": {"sequences": [(1, 140), (1, 17)], "heads": 6, "head_dim": 80, "bits": (5, 6), "page": 16},
    "codes of large heads": {"sequences": [(2, 130)], "heads": 2, "kv_heads": 1, "head_dim": 256, "bits": (6, 4)},
}
PREFILL = {
    "whole": {"sequences": [(70, 70)]},
    "after a prefix, ragged": {"sequences": [(33, 200), (17, 17), (1, 40), (0, 3), (16, 80)], "page": 16},
    "wide group": {"sequences": [(21, 90)], "heads": 7, "kv_heads": 1, "head_dim": 128},
    "window": {"sequences": [(60, 170)], "heads": 3, "kv_heads": 1, "head_dim": 96, "dtype": BF16, "window": 50},
    "softcap, large heads": {"sequences": [(20, 50)], "heads": 2, "kv_heads": 1, "head_dim": 256, "softcap": 3.0},
    "codes": {"sequences": [(40, 130), (20, 20)], "bits": (4, 8), "page": 16},
    "codes of odd groups": {"sequences": [(33, 90)], "heads": 2, "head_dim": 80, "bits": (7, 5), "window": 64},
    "codes of small heads": {"sequences": [(18, 40)], "head_dim": 16, "bits": (6, 6)},
    "codes of large heads": {"sequences": [(17, 40)], "heads": 2, "kv_heads": 1, "head_dim": 256, "bits": (4, 4)},
}


def check(case: Case, out: torch.Tensor) -> None:
    exact = case.dense(halves=False)
    assert out.dtype == case.q.dtype
    # The kernels round queries, weights and values as `halves` does; float32 sums stay far below.
    assert_as_good_as(out.cpu(), case.dense(halves=True), exact, floor=2.0**-12)


@pytest.mark.parametrize("shape", DECODE.values(), ids=DECODE.keys())
def test_decoding_against_float64_in_every_order(card, shape: dict) -> None:
    case = Case(**shape, device=card.device)
    check(case, card.every_order(lambda: cuda.paged_attention(*case.arguments()), seeds=1))


@pytest.mark.parametrize("shape", PREFILL.values(), ids=PREFILL.keys())
def test_prefill_against_float64_in_every_order(card, shape: dict) -> None:
    case = Case(**shape, device=card.device)
    check(case, card.every_order(lambda: own(case), seeds=1))


def own(case: Case) -> torch.Tensor:
    """By our kernels alone, whatever `choose` would take on this machine."""
    out = torch.full_like(case.q, float("nan"))
    cuda.run(*case.arguments(), out, True, True)
    return out


@pytest.mark.parametrize("bits", list(kv_quant.BITS))
@pytest.mark.parametrize("head_dim", [32, 64])
def test_codes_of_all_widths(card, bits: int, head_dim: int) -> None:
    """Both kernels, the widths of keys and values going opposite ways."""
    case = Case([(1, 150), (17, 40)], bits=(bits, 10 - bits), heads=2, head_dim=head_dim, page=16, device=card.device)
    check(case, own(case))


@pytest.mark.parametrize("shape", [DECODE[name] for name in ("ragged", "many columns", "window", "4 bits")])
def test_decoding_depends_on_nothing_but_the_keys(card, shape: dict) -> None:
    """All together, each sequence alone, and row by row: the same bits; and beside a long prompt."""
    case = Case(**shape, device=card.device)
    whole = cuda.paged_attention(*case.arguments())
    for size in (16, 2, 1):
        alone = torch.cat([cuda.paged_attention(*part.arguments()) for part in case.parts(size)])
        assert same_bits(alone.cpu(), whole.cpu()), f"{size} rows at a time"


def test_decoding_beside_a_prompt(card) -> None:
    case = Case([(1, 140), (40, 60), (3, 30)], device=card.device)
    whole = cuda.paged_attention(*case.arguments())
    first, last = case.parts(64)[0], case.parts(64)[2]
    assert same_bits(cuda.paged_attention(*first.arguments()).cpu(), whole[:1].cpu())
    assert same_bits(cuda.paged_attention(*last.arguments()).cpu(), whole[-3:].cpu())


def test_prefill_in_pieces(card) -> None:
    """Pieces of more than DECODE_ROWS rows, at any boundary: the same bits."""
    case = Case([(90, 130)], head_dim=32, window=70, device=card.device)
    pieces = torch.cat([own(part) for part in case.parts(30)])
    assert same_bits(pieces.cpu(), own(case).cpu())


@pytest.mark.parametrize("rows", [2, 20])
def test_unread_memory_may_hold_anything(card, rows: int) -> None:
    case = Case([(rows, 300)], window=20, page=32, device=card.device)
    clean = own(case)
    seen = torch.zeros(case.k_pages.shape[:2], dtype=torch.bool)
    for j in range(300 - rows - 19, 300):
        seen[case.table[0, j // 32], j % 32] = True
    case.k_pages[~seen.to(card.device)] = float("nan")
    case.v_pages[~seen.to(card.device)] = float("inf")
    case.pages[0, :5] = 2**30
    assert same_bits(own(case).cpu(), clean.cpu())


@pytest.mark.parametrize(("rows", "softcap"), [(1, None), (1, 5.0), (20, None)])
def test_nan_is_not_hidden(card, rows: int, softcap: float | None) -> None:
    case = Case([(rows, 40)], heads=2, kv_heads=2, softcap=softcap, device=card.device)
    case.k_pages[case.table[0, 0], 7, 1, 3] = float("nan")
    out = own(case)
    assert out[:, 1].isnan().all() and out[:, 0].isfinite().all()


def test_extreme_scores(card) -> None:
    for factor in (2000.0, 0.0):
        case = Case([(2, 200), (18, 70)], heads=2, kv_heads=1, device=card.device)
        case.q *= factor
        check(case, own(case))


def test_the_workspace_is_left_as_it_was_found(card) -> None:
    """Tickets are put back, and a larger batch in between changes nothing."""
    small, large = (Case([(1, 700)] * count, head_dim=16, device=card.device) for count in (1, 40))
    first = cuda.paged_attention(*small.arguments())
    cuda.paged_attention(*large.arguments())
    assert same_bits(cuda.paged_attention(*small.arguments()).cpu(), first.cpu())
    assert not any(space.tickets.any() for space in cuda._workspaces.values())


def test_other_precisions_and_what_the_kernels_refuse(card, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([(2, 40)], device=card.device)
    expected = cuda.paged_attention(*case.arguments())
    wide = cuda.paged_attention(case.q.float(), *case.arguments()[1:])
    assert wide.dtype == torch.float32 and torch.equal(wide.half(), expected)
    for change in ({"head_dim": 24}, {"dtype": torch.float32}, {"page": 8}, {"page": 48}):
        odd = Case([(2, 40)], **change, device=card.device)
        assert choose.refusal(odd.head_dim, odd.k_pages) is not None
        assert torch.equal(cuda.paged_attention(*odd.arguments()), reference.paged_attention(*odd.arguments()))


def test_nothing_to_do(card) -> None:
    for sequences in ([(0, 9), (0, 1)], []):
        case = Case(sequences, device=card.device)
        assert cuda.paged_attention(*case.arguments()).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(window=0), "window must be positive"),
        (lambda a: a.update(softcap=-1.0), "softcap must be positive"),
        (lambda a: a.update(v_pages=a["v_pages"].bfloat16()), "v_pages must be a contiguous CUDA tensor of dtype Half"),
        (lambda a: a.update(q=a["q"][:, :3].contiguous()), "3 query heads"),
        (lambda a: a.update(kv_lengths=a["kv_lengths"].long()), "kv_lengths must be"),
        (lambda a: a.update(q_starts=a["q_starts"][:1]), "q_starts must have shape"),
        (lambda a: a.update(k_pages=a["k_pages"][..., 1:]), "k_pages must"),
    ],
)
def test_the_binding_refuses_what_would_read_outside(card, change, message: str) -> None:
    names = ("q", "k_pages", "v_pages", "q_starts", "kv_lengths", "pages", "scale", "window", "softcap")
    case = Case([(3, 40)], device=card.device)
    arguments = dict(zip(names, case.arguments(), strict=True))
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        cuda.paged_attention(**arguments)


def test_the_choice_is_explained_and_logged_once(card, caplog: pytest.LogCaptureFixture) -> None:
    case = Case([(20, 20)], device=card.device)
    choose._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=choose.logger.name):
        for _ in range(2):
            cuda.paged_attention(*case.arguments())
    assert len(caplog.records) == 1 and "attention of prompts" in caplog.text
    said = choose.describe(card.device, head_dim=64, pages=case.k_pages)
    assert said["decode"].name == "own" and said["prefill"].reason in caplog.text


@pytest.mark.gpu
def test_a_context_of_32k_tokens(card) -> None:
    """Decoding and the end of a prompt over 32768 keys, half and 4-bit; on hardware only."""
    if card.emulated:
        pytest.skip("hours in the emulation")
    for change in ({"dtype": F16}, {"bits": (4, 4)}):
        case = Case([(1, 32768), (40, 32768)], heads=8, head_dim=128, page=256, device=card.device, **change)
        check(case, own(case))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, (4, 4)])
def test_a_captured_step_replays_with_other_lengths(card, bits: tuple[int, int] | None) -> None:
    if card.emulated:
        pytest.skip("graphs are a card's")
    case = Case([(1, 1500), (1, 40)], bits=bits, page=256, device=card.device)
    arguments = list(case.arguments())
    cuda.paged_attention(*arguments)  # the workspace is there before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.paged_attention(*arguments)
    for lengths in ([1500, 40], [3, 39], [1025, 1]):
        arguments[4].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        replayed = out.clone()
        assert same_bits(replayed.cpu(), cuda.paged_attention(*arguments).cpu())
