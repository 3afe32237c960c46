"""The memory behind the pages."""

import resource

import pytest
import torch

from exl_runtime.cache import storage
from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import BF16, FP16, FP32, CacheType, cache_type
from exl_runtime.errors import OutOfMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [FP32, FP16, BF16], ids=lambda kind: kind.name)
def test_layers_are_zero_contiguous_aligned_and_apart(kind: CacheType) -> None:
    kv = KVStorage(CacheGeometry(3, 2, 5, kind, 4), 7, CPU)
    dtype = kind.dtype
    assert kv.nbytes == 3 * 2 * 7 * 4 * 2 * 5 * dtype.itemsize
    parts = [part for index in range(3) for part in kv.layer(index)]
    for part in parts:
        assert part.shape == (7, 4, 2, 5) and part.dtype == dtype and part.is_contiguous()
        assert not part.any()
    assert parts[0].data_ptr() % 64 == 0
    for number, part in enumerate(parts, 1):
        part.fill_(number)
    assert [float(part.unique()) for part in parts] == [1, 2, 3, 4, 5, 6]


def test_rows_of_codes_for_keys_and_for_values() -> None:
    kv = KVStorage(CacheGeometry(3, 2, 80, cache_type("k6v4"), 4), 7, CPU)
    # 3 scales of 2 bytes, and 5 steps of 16 codes
    keys, values = 6 + 5 * 12, 6 + 5 * 8
    assert kv.nbytes == 3 * 7 * 4 * 2 * (keys + values)
    for index in range(3):
        k_pages, v_pages = kv.layer(index)
        assert k_pages.shape == (7, 4, 2, keys) and v_pages.shape == (7, 4, 2, values)
        assert k_pages.dtype == v_pages.dtype == torch.uint8
        assert k_pages.is_contiguous() and v_pages.is_contiguous()
        assert not k_pages.any() and not v_pages.any()


@pytest.mark.parametrize("name", ["fp32", "k8v3"])
def test_copy_page_copies_the_first_tokens_of_every_layer(name: str) -> None:
    kv = KVStorage(CacheGeometry(2, 1, 3, cache_type(name), 4), 3, CPU)
    for index in range(2):
        for part in kv.layer(index):
            part.copy_(torch.randn(part.shape) * 20 + 100)
    before = [[part.clone() for part in kv.layer(index)] for index in range(2)]
    kv.copy_page(2, 0, 3)
    for index in range(2):
        for part, old in zip(kv.layer(index), before[index], strict=True):
            assert torch.equal(part[0, :3], old[2, :3])
            assert torch.equal(part[0, 3:], old[0, 3:])
            assert torch.equal(part[1:], old[1:])


def test_too_large_says_how_much_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_memory", lambda device: 3 * 2**20)
    geometry = CacheGeometry(1, 1, 512, FP32)  # 1 MiB a page
    with pytest.raises(OutOfMemory, match=r"1024 tokens needs 4.0 MiB, 3.0 MiB are free on cpu") as caught:
        KVStorage(geometry, 4, CPU)
    assert "768 tokens would fit" in str(caught.value)
    assert KVStorage(geometry, 3, CPU).nbytes == 3 * 2**20


def test_failing_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(storage, "_zeros", fail)
    with pytest.raises(OutOfMemory, match="are free on cpu"):
        KVStorage(CacheGeometry(1, 1, 8, FP32), 1, CPU)


def test_untouched_pages_cost_no_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = resident()
    kv = KVStorage(CacheGeometry(4, 1, 64, FP32), 1024, CPU)
    assert kv.nbytes == 512 * 2**20
    kv.layer(3)[1][1000].fill_(1.0)
    assert resident() - before < 64 * 2**20
