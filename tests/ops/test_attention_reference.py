"""Paged attention against dense float64 attention, and the appending of keys."""

import pytest
import torch
from oracles import assert_as_good_as, same_bits

from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops.attention import reference
from exl_runtime.ops.attention.reference import paged_attention
from exl_runtime.ops.kv_append import append_kv
from exl_runtime.ops.table import opset

PAGE = 8


class Case:
    """A ragged batch over scattered pages. `sequences`: (new tokens, keys in all)."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        counts = [-(-length // PAGE) for _, length in sequences]
        order = torch.randperm(sum(counts) + 3, generator=random).tolist()  # three pages belong to nobody
        self.k_pages = torch.randn(len(order), PAGE, kv_heads, head_dim, generator=random).to(dtype)
        self.v_pages = torch.randn(len(order), PAGE, kv_heads, head_dim, generator=random).to(dtype)
        self.pages = torch.zeros(len(sequences), max(counts, default=0) + 1, dtype=torch.int32)
        for s, count in enumerate(counts):
            self.pages[s, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        news = torch.tensor([0] + [new for new, _ in sequences])
        self.q_starts = news.cumsum(0).to(torch.int32)
        self.kv_lengths = torch.tensor([length for _, length in sequences], dtype=torch.int32)
        self.q = torch.randn(int(news.sum()), heads, head_dim, generator=random).to(dtype)

    def run(self, scale: float = 0.25, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        return paged_attention(
            self.q, self.k_pages, self.v_pages, self.q_starts, self.kv_lengths, self.pages, scale, window, softcap
        )

    def dense(
        self, dtype: torch.dtype, scale: float = 0.25, window: int | None = None, softcap: float | None = None
    ) -> torch.Tensor:
        """One query at a time over a list of visible keys, all in `dtype`."""
        out = torch.zeros(self.q.shape, dtype=dtype)
        group = self.q.shape[1] // self.k_pages.shape[2]
        for s, length in enumerate(self.kv_lengths.tolist()):
            start, stop = self.q_starts[s : s + 2].tolist()
            where = [(int(self.pages[s, j // PAGE]), j % PAGE) for j in range(length)]
            for row in range(start, stop):
                index = length - (stop - start) + row - start
                seen = [j for j in range(index + 1) if window is None or j > index - window]
                keys = torch.stack([self.k_pages[where[j]] for j in seen]).to(dtype)
                values = torch.stack([self.v_pages[where[j]] for j in seen]).to(dtype)
                for head in range(self.q.shape[1]):
                    scores = keys[:, head // group] @ self.q[row, head].to(dtype) * scale
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    out[row, head] = torch.softmax(scores, -1) @ values[:, head // group]
        return out


SEQUENCES = {
    "one token": [(1, 1)],
    "decode": [(1, 29), (1, 8), (1, 17)],
    "prefill": [(23, 23)],
    "page edges": [(PAGE, PAGE), (PAGE + 1, PAGE + 1), (PAGE - 1, PAGE - 1)],
    "chunks after a prefix": [(5, 21), (16, 32)],
    "mixed with an empty one": [(1, 30), (0, 12), (13, 13), (1, 1)],
}


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (1, None), (None, 1.5), (9, 2.0)])
def test_against_float64(
    sequences: list[tuple[int, int]], heads: int, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    case = Case(sequences, heads, kv_heads)
    exact = case.dense(torch.float64, window=window, softcap=softcap)
    naive = case.dense(torch.float32, window=window, softcap=softcap)
    assert_as_good_as(case.run(window=window, softcap=softcap), naive, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    case = Case([(9, 40), (1, 33)], dtype=dtype)
    exact = case.dense(torch.float64)
    actual = case.run()
    assert actual.dtype == dtype
    assert_as_good_as(actual, exact.to(dtype), exact, factor=1.01)


def test_cache_in_another_precision_than_the_queries() -> None:
    case = Case([(4, 19)])
    case.k_pages, case.v_pages = case.k_pages.half(), case.v_pages.half()
    exact = case.dense(torch.float64)
    actual = case.run()
    assert actual.dtype == torch.float32
    assert_as_good_as(actual, case.dense(torch.float32), exact)


def test_a_window_that_reaches_everything_is_no_window() -> None:
    case = Case([(7, 25), (1, 14)])
    assert same_bits(case.run(window=25), case.run())


def test_the_others_in_the_batch_do_not_matter() -> None:
    batch = Case([(3, 20), (11, 11), (1, 30)])
    together = batch.run(window=7)
    for s in range(3):
        start, stop = batch.q_starts[s : s + 2].tolist()
        alone = paged_attention(
            batch.q[start:stop],
            batch.k_pages,
            batch.v_pages,
            torch.tensor([0, stop - start], dtype=torch.int32),
            batch.kv_lengths[s : s + 1],
            batch.pages[s : s + 1],
            0.25,
            7,
            None,
        )
        assert same_bits(alone, together[start:stop])


def test_unread_memory_may_hold_anything() -> None:
    case = Case([(2, 11), (1, 9)])
    expected = case.run()
    used = {int(case.pages[s, j // PAGE]) * PAGE + j % PAGE for s, n in ((0, 11), (1, 9)) for j in range(n)}
    for slot in set(range(case.k_pages.shape[0] * PAGE)) - used:
        case.k_pages.view(-1, 2, 16)[slot] = float("nan")
        case.v_pages.view(-1, 2, 16)[slot] = float("nan")
    assert same_bits(case.run(), expected)


@pytest.mark.parametrize("limit", [1, 500, 3000])
def test_long_prefills_run_in_pieces(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    case = Case([(29, 41)])
    exact, naive = case.dense(torch.float64, window=13), case.dense(torch.float32, window=13)
    monkeypatch.setattr(reference, "SCORES", limit)
    assert_as_good_as(case.run(window=13), naive, exact)


def test_nothing_to_do() -> None:
    assert Case([]).run().shape == (0, 4, 16)
    assert Case([(0, 5)]).run().shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_append_writes_the_slots_and_nothing_else(dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    k_pages, v_pages = torch.randn(2, 3, PAGE, 2, 4).to(dtype)
    before_k, before_v = k_pages.clone(), v_pages.clone()
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    slots = torch.tensor([2 * PAGE + 7, 0, PAGE + 3])
    append_kv(k, v, k_pages, v_pages, slots)
    for pages, before, new in ((k_pages, before_k, k), (v_pages, before_v, v)):
        for row, (page, offset) in enumerate([(2, 7), (0, 0), (1, 3)]):
            assert torch.equal(pages[page, offset], new[row].to(dtype))
            before[page, offset] = new[row].to(dtype)
        assert torch.equal(pages, before)
    append_kv(k[:0], v[:0], k_pages, v_pages, slots[:0])


def test_the_reference_op_set_is_complete_and_unknown_ones_are_named() -> None:
    ops = opset("reference")
    assert ops.backend == "reference" and ops.paged_attention is paged_attention
    assert opset("reference") is ops
    with pytest.raises(BackendUnavailable, match="abacus"):
        opset("abacus")
