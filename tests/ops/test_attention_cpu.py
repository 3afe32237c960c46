"""The native attention kernel against float64, and its promise: a query's result depends on nothing but its keys."""

from dataclasses import dataclass

import pytest
import torch
from oracles import assert_as_good_as, same_bits

from exl_runtime.ops import native
from exl_runtime.ops.attention.cpu import paged_attention
from exl_runtime.ops.table import opset

pytestmark = pytest.mark.usefixtures("kernels")


@dataclass
class Case:
    """A ragged batch over scattered pages. `sequences`: (new tokens, keys in all)."""

    sequences: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    page: int = 256

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(len(self.sequences) + self.head_dim)
        counts = [-(-length // self.page) for _, length in self.sequences]
        order = torch.randperm(sum(counts) + 2, generator=random)  # two pages belong to nobody
        shape = (len(order), self.page, self.kv_heads, self.head_dim)
        self.k_pages = torch.randn(shape, generator=random).to(self.dtype)
        self.v_pages = torch.randn(shape, generator=random).to(self.dtype)
        self.pages = torch.full((len(counts), max(counts, default=0)), -1, dtype=torch.int32)
        for s, pages in enumerate(order.split([*counts, 2])[:-1]):
            self.pages[s, : counts[s]] = pages
        self.news = [new for new, _ in self.sequences]
        self.lengths = torch.tensor([length for _, length in self.sequences], dtype=torch.int32)
        self.q = torch.randn(sum(self.news), self.heads, self.head_dim, generator=random) * 2

    def attend(self, q: torch.Tensor, news: list[int], lengths: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([0, *news]).cumsum(0).to(torch.int32)
        scale = self.head_dim**-0.5
        return paged_attention(q, self.k_pages, self.v_pages, starts, lengths, pages, scale, self.window, self.softcap)

    def run(self) -> torch.Tensor:
        return self.attend(self.q, self.news, self.lengths, self.pages)

    def pieces(self, size: int) -> torch.Tensor:
        """Sequence by sequence, `size` queries at a time."""
        out, row = [], 0
        for s, (new, length) in enumerate(self.sequences):
            for start in range(0, new, size):
                count = min(size, new - start)
                end = torch.tensor([length - new + start + count], dtype=torch.int32)
                out.append(self.attend(self.q[row : row + count], [count], end, self.pages[s : s + 1]))
                row += count
        return torch.cat(out)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """All in `dtype`, over gathered keys."""
        out, row = [torch.zeros(0, self.heads, self.head_dim, dtype=dtype)], 0
        for s, (new, length) in enumerate(self.sequences):
            held = self.pages[s, : -(-length // self.page)].long()
            group = self.heads // self.kv_heads
            k = self.k_pages[held].flatten(0, 1)[:length].to(dtype).repeat_interleave(group, 1)
            v = self.v_pages[held].flatten(0, 1)[:length].to(dtype).repeat_interleave(group, 1)
            scores = torch.einsum("thd,jhd->htj", self.q[row : row + new].to(dtype), k) * self.head_dim**-0.5
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            distance = torch.arange(length - new, length)[:, None] - torch.arange(length)
            hidden = (distance < 0) | (distance >= (self.window or length))
            weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
            out.append(torch.einsum("htj,jhd->thd", weights, v))
            row += new
        return torch.cat(out)


CASES = {
    "one token": Case([(1, 1)]),
    "short prefill": Case([(17, 17)], heads=6, head_dim=20),
    "chunk edges": Case([(3, 255), (3, 256), (3, 257), (2, 513)], head_dim=32),
    "decode, float16": Case([(1, 700), (1, 5), (1, 257)], heads=8, head_dim=80, dtype=torch.float16),
    "ragged, bfloat16, odd size": Case([(70, 300), (1, 17), (0, 9), (9, 600)], heads=5, kv_heads=1, head_dim=33,
                                       dtype=torch.bfloat16),
    "window": Case([(40, 900), (1, 400)], heads=7, kv_heads=7, window=100),
    "window of one": Case([(5, 260)], window=1),
    "softcap": Case([(30, 290)], softcap=3.0, dtype=torch.float16),
    "window and wide softcap": Case([(20, 600)], heads=2, kv_heads=1, head_dim=128, window=300, softcap=50.0),
    "large heads": Case([(4, 280)], heads=2, kv_heads=1, head_dim=512, dtype=torch.bfloat16),
    "small pages": Case([(33, 60), (1, 100)], page=16, head_dim=48, window=30),
    "eight queries to a key": Case([(1, 600), (1, 31)], heads=16, kv_heads=2, head_dim=64),
    "more heads than are taken together": Case([(1, 520), (2, 270)], heads=24, kv_heads=24, head_dim=128, page=16),
    "heads that nothing divides, window": Case([(1, 800), (1, 290)], heads=20, kv_heads=5, head_dim=64, window=301),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_against_float64(case: Case, isa: str) -> None:
    assert_as_good_as(case.run(), case.dense(torch.float32), case.dense(torch.float64))


def test_whole_equals_pieces_equals_token_by_token(case: Case, isa: str) -> None:
    whole = case.run()
    for size in (1, 7, 25):
        assert same_bits(case.pieces(size), whole), f"{size} at a time"


def test_threads_and_instruction_sets_do_not_matter(case: Case, restore: None) -> None:
    seen = []
    for name in ("avx2", "avx512"):
        try:
            native.ops().set_isa(name)
        except RuntimeError as err:
            pytest.skip(str(err))
        for threads in (1, 2, 3, 8):
            native.ops().set_threads(threads)
            seen.append(case.run())
    assert all(same_bits(seen[0], other) for other in seen[1:])


def test_unread_memory_may_hold_anything(isa: str) -> None:
    case = Case([(3, 300), (2, 40)], window=20, dtype=torch.float16)  # the first sequence sees keys 278 to 299 only
    clean = case.run()
    seen = torch.zeros(case.k_pages.shape[:2], dtype=torch.bool)
    for s, (new, length) in enumerate(case.sequences):
        for j in range(length - new - 19, length):
            seen[case.pages[s, j // 256], j % 256] = True
    case.k_pages[~seen] = float("nan")
    case.v_pages[~seen] = float("inf")
    case.pages[0, 0] = -1
    assert same_bits(case.run(), clean)


def test_nan_is_not_hidden(isa: str) -> None:
    for softcap in (None, 5.0):
        case = Case([(2, 40)], heads=2, kv_heads=2, softcap=softcap)
        case.k_pages[case.pages[0, 0], 7, 1, 3] = float("nan")
        out = case.run()
        assert out[:, 1].isnan().all()
        assert out[:, 0].isfinite().all()


def test_extreme_scores(isa: str) -> None:
    case = Case([(2, 300)], heads=2, kv_heads=1)
    case.q *= 1e4
    assert_as_good_as(case.run(), case.dense(torch.float32), case.dense(torch.float64))
    case.q *= 0.0
    assert_as_good_as(case.run(), case.dense(torch.float32), case.dense(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries_are_widened(dtype: torch.dtype) -> None:
    case = Case([(5, 40)], dtype=dtype)
    case.q = case.q.to(dtype)
    narrow = case.run()
    case.q = case.q.float()
    assert torch.equal(narrow, case.run().to(dtype))


def test_nothing_to_do() -> None:
    assert Case([(0, 9), (0, 1)]).run().shape == (0, 4, 64)
    assert Case([]).run().shape == (0, 4, 64)


def test_the_cpu_op_set_uses_it() -> None:
    assert opset("cpu").paged_attention is paged_attention


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pages.fill_(99), "wants page 99"),
        (lambda c: c.pages.fill_(-2), "wants page -2"),
        (lambda c: c.lengths.fill_(2), "3 queries, 2 keys"),
        (lambda c: c.lengths.fill_(5000), "5000 keys"),
        (lambda c: setattr(c, "news", [2]), "q_starts must run"),
        (lambda c: setattr(c, "news", [5, -2]), "q_starts must have shape"),
        (lambda c: setattr(c, "window", 0), "window must be positive"),
        (lambda c: setattr(c, "softcap", -1.0), "softcap must be positive"),
        (lambda c: setattr(c, "v_pages", c.v_pages.half()), "v_pages"),
        (lambda c: setattr(c, "q", c.q[:, :3]), "3 query heads"),
    ],
)
def test_the_binding_refuses_what_would_read_outside(change: object, message: str) -> None:
    case = Case([(3, 40)])
    change(case)
    with pytest.raises(RuntimeError, match=message):
        case.run()
