"""Host memory below the pages: what leaves the cache comes back, within its bytes, and never a wrong token."""

from pathlib import Path

import pytest
import torch
from fakes import Rig, expected, request
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.cache import tiers
from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.prefix import Node, chain, pack, root_key
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.tiers import HostTier, host_limit, read_page, write_page
from exl_runtime.cache.types import cache_type
from exl_runtime.errors import UsageError
from exl_runtime.generation.request import Result

TYPES = ("fp32", "fp16", "bf16", "q8", "q6", "q4", "k6v4", "k3v2")
PAGE = 4 * 2 * 2 * 4  # bytes of a page of the fakes: 4 tokens, 2 layers, key and value, float32
CPU = torch.device("cpu")


def ask(rig: Rig, prompt: list[int], count: int = 4, seed: int = 0) -> Result:
    (result,) = rig.generator.run([request(prompt, count, seed=seed)])
    rig.check()
    assert rig.generator.tiers.host.nbytes <= rig.host_bytes
    assert result.ids == tuple(expected(prompt, count, seed=seed))
    return result


def test_a_conversation_that_was_pushed_out_comes_back() -> None:
    first, second = list(range(13)), [25, *range(14)]
    for host_bytes, reused in ((0, 0), (100 * PAGE, 12)):
        rig = Rig(pages=5, host_bytes=host_bytes)
        ask(rig, first)
        ask(rig, second)
        assert ask(rig, first).reused_tokens == reused
        stats = rig.generator.stats
        assert stats.host_tokens == reused and stats.evictions > 0
    assert ask(rig, second).reused_tokens == 14  # and the other way round


def test_it_comes_back_in_the_middle_of_a_page_without_a_copy() -> None:
    rig = Rig(pages=5, host_bytes=100 * PAGE)
    ask(rig, list(range(13)))
    ask(rig, [25, *range(14)])
    copies: list[object] = []
    copy_page = rig.kv.copy_page
    rig.kv.copy_page = lambda *args: (copies.append(args), copy_page(*args))  # type: ignore[method-assign]
    assert ask(rig, [*range(7), 20, 21]).reused_tokens == 7  # a page, and three tokens of the next
    assert not copies


def test_a_longer_beginning_below_is_preferred_to_a_shorter_one_in_the_cache() -> None:
    rig = Rig(pages=5, host_bytes=100 * PAGE)
    ask(rig, list(range(16)), 1)
    ask(rig, [25, *range(15)], 1)
    ask(rig, [0, 1, 29, 28], 1)
    assert ask(rig, [0, 1, 2, 30], 1).reused_tokens == 3


def test_forgetting_forgets_all() -> None:
    rig = Rig(pages=5, host_bytes=100 * PAGE)
    ask(rig, list(range(13)))
    ask(rig, [25, *range(14)])
    assert rig.generator.stats.host_bytes > 0
    rig.generator.forget()
    assert rig.generator.stats.host_bytes == 0 and ask(rig, list(range(13))).reused_tokens == 0


def test_what_is_computed_in_a_failed_pass_is_not_kept() -> None:
    rig = Rig(pages=5, host_bytes=100 * PAGE)

    def fails(batch: object) -> None:
        raise RuntimeError("broken")

    before, rig.model.before = rig.model.before, fails
    with pytest.raises(RuntimeError, match="broken"):
        rig.generator.run([request(list(range(13)), 2)])
    rig.model.before = before
    ask(rig, [25, *range(14)])
    assert ask(rig, list(range(13))).reused_tokens == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 5)), max_size=14),
    st.sampled_from([0, PAGE - 1, 2 * PAGE, 3 * PAGE + 20, 50 * PAGE]),
)
def test_never_a_wrong_token(prompts: list[tuple[list[int], int]], host_bytes: int) -> None:
    """Two tokens and few pages, so that everything collides: text equals the oracle's, invariants hold."""
    rig = Rig(pages=5, host_bytes=host_bytes)
    for seed, (prompt, count) in enumerate(prompts):
        ask(rig, prompt, count, seed=seed % 3)
        host = rig.generator.tiers.host
        assert sum(image.numel() for images in host._images.values() for image in images) == host.nbytes
        assert set(host._tree.nodes) == set(host._images)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=18), st.integers(1, 6)), max_size=8),
    st.sampled_from([0, 4 * PAGE, 50 * PAGE]),
)
def test_batches_that_push_each_other_out(prompts: list[tuple[list[int], int]], host_bytes: int) -> None:
    rig = Rig(pages=7, host_bytes=host_bytes)
    for _ in range(2):
        results = rig.generator.run([request(p, n, seed=k) for k, (p, n) in enumerate(prompts)])
        rig.check()
        assert [r.ids for r in results] == [tuple(expected(p, n, seed=k)) for k, (p, n) in enumerate(prompts)]


def test_pages_of_a_draft_model_come_back_too() -> None:
    from fakes import FakeTransformer

    rig = Rig(pages=5, host_bytes=100 * PAGE, draft=FakeTransformer())
    reads: list[int] = []
    rig.generator.tiers.host.put(Node(root_key(), pack([31]), None, True), 8, lambda: reads.append(1) or [])
    assert reads == [1]
    ask(rig, list(range(13)))
    ask(rig, [25, *range(14)])
    assert {len(images) for images in rig.generator.tiers.host._images.values()} == {0, 2}
    assert ask(rig, list(range(13))).reused_tokens == 12


# --- the tier by itself -----------------------------------------------------------------------------------------------


def node(*tokens: int, parent: bytes | None = None, size: int = 4) -> Node:
    parent = parent or root_key()
    packed = pack(tokens)
    return Node(parent, packed, chain(parent, packed) if len(tokens) == size else None, True)


def put(tier: HostTier, one: Node, size: int) -> bool:
    read = []
    tier.put(one, size, lambda: read.append(1) or [torch.zeros(size, dtype=torch.uint8)])
    return bool(read)


def test_equal_pages_are_kept_once_and_beginnings_give_way() -> None:
    tier = HostTier(100)
    assert put(tier, node(1, 2), 10)
    assert put(tier, node(1, 2, 3, 4), 20) and (len(tier), tier.nbytes) == (1, 20)
    assert not put(tier, node(1, 2, 3, 4), 20) and not put(tier, node(1), 5)
    assert put(tier, node(1, 5), 10) and (len(tier), tier.nbytes) == (2, 30)


def test_the_least_recently_used_goes_first() -> None:
    tier = HostTier(60)
    for first in (1, 2, 3):
        put(tier, node(first, 0, 0, 0), 20)
    assert tier.find(root_key(), pack([1, 0, 0, 0]), node(1, 0, 0, 0).key) is not None
    put(tier, node(4, 0, 0, 0), 20)
    left = [first for first in (1, 2, 3, 4) if tier.find(root_key(), pack([first]), None)]
    assert left == [1, 3, 4] and tier.dropped == 1
    assert not put(tier, node(5, 0, 0, 0), 61)  # larger than all of it: nothing is dropped for it
    assert len(tier) == 3


@pytest.mark.parametrize("name", TYPES)
def test_an_image_is_the_page(name: str) -> None:
    """All types, whole pages and parts of them, against the tensors themselves."""
    geometry = CacheGeometry(3, 2, 64, cache_type(name), 8)
    kv = KVStorage(geometry, 4, CPU)
    for tensor in (kv.keys, kv.values):
        raw = tensor.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8))
    before = [part.view(torch.uint8).clone() for part in (kv.keys, kv.values)]
    for tokens, wanted in ((8, 8), (8, 3), (5, 5), (5, 1)):
        image = read_page(kv, 1, tokens)
        assert image.numel() == tokens * geometry.bytes_per_token
        write_page(kv, 3, wanted, image)
        for part, old in zip((kv.keys, kv.values), before, strict=True):
            new = part.view(torch.uint8)
            assert torch.equal(new[:, 3, :wanted], old[:, 1, :wanted])
            assert torch.equal(new[:, 3, wanted:], old[:, 3, wanted:]) and torch.equal(new[:, :3], old[:, :3])
            new[:, 3] = old[:, 3]


def test_how_much_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, free = torch.device("cuda"), 40 << 30
    monkeypatch.setattr(tiers, "free_host_memory", lambda root=Path("/"): free)
    assert host_limit("auto", CPU) == 0 and host_limit("auto", gpu) == 10 << 30
    assert host_limit(123, CPU) == host_limit(123, gpu) == 123
    free = 400 << 30
    assert host_limit("auto", gpu) == 16 << 30
    for wrong in (-1, True, "8G", 1.5, None):
        with pytest.raises(UsageError, match="host_cache"):
            host_limit(wrong, CPU)  # type: ignore[arg-type]
