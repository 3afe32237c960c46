"""Sizes of the cache, and what memory is there for it."""

from pathlib import Path

import pytest
import torch

from exl_runtime.cache.geometry import PAGE_SIZE, CacheGeometry, free_host_memory, free_memory
from exl_runtime.cache.names import CHOICES, bits_of_name, check_name
from exl_runtime.cache.types import BF16, FP16, FP32, CacheType, cache_type
from exl_runtime.errors import UsageError


def test_sizes_by_hand() -> None:
    # 32 layers, 8 heads of 128, keys and values, 2 bytes: the well-known 128 KiB a token
    geometry = CacheGeometry(layers=32, kv_heads=8, head_dim=128, type=FP16)
    assert PAGE_SIZE == 256
    assert geometry.bytes_per_token == 128 * 1024
    assert geometry.bytes_per_page == 32 * 1024 * 1024
    assert [geometry.pages_for(n) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    assert [geometry.pages_in(n) for n in (-1, 0, 2**25 - 1, 2**25, 10 * 2**25 + 7)] == [0, 0, 0, 1, 10]


def test_types() -> None:
    assert [CacheGeometry(2, 3, 4, kind).bytes_per_token for kind in (FP32, FP16, BF16)] == [192, 96, 96]


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [  # bits of a key and a value together: the codes, and a half for every 32
        ("q8", 128, 17),
        ("q6", 64, 13),
        ("q4", 32, 9),
        ("k6v4", 96, 11),
        ("k2v7", 256, 10),
        ("q4", 80, 2 * (4 + 16 * 3 / 80)),  # 2 1/2 groups have 3 scales
        ("q4", 100, 2 * (4 * 112 / 100 + 16 * 4 / 100)),  # 12 codes too many in the last step
    ],
)
def test_quantized_sizes_by_hand(name: str, head_dim: int, bits: float) -> None:
    geometry = CacheGeometry(3, 5, head_dim, cache_type(name))
    assert geometry.bytes_per_token == pytest.approx(3 * 5 * head_dim * bits / 8)
    assert geometry.bytes_per_page == 256 * geometry.bytes_per_token


def test_names_of_types() -> None:
    assert [cache_type(name) for name in ("fp32", "fp16", "bf16")] == [FP32, FP16, BF16]
    assert cache_type("q6") == CacheType("q6", torch.uint8, 6, 6)
    assert cache_type("k6v4") == CacheType("k6v4", torch.uint8, 6, 4)
    assert cache_type("k8v8") == cache_type("q8") and check_name("k4v4") == "q4"
    assert all(cache_type(f"k{k}v{v}").quantized for k in range(2, 9) for v in range(2, 9))
    assert bits_of_name("fp16") is None and not FP16.quantized


@pytest.mark.parametrize("name", ["q5", "Q4", "k9v4", "k1v4", "k6", "k6v4 ", "k44v4", "", "fp8", "auto"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UsageError, match="unknown cache type") as caught:
        cache_type(name)
    assert CHOICES in caught.value.hint


def test_free_memory_of_this_machine() -> None:
    assert 2**24 < free_memory(torch.device("cpu")) < 2**50


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000000 kB\nMemFree: 5 kB\nMemAvailable:    1000 kB"}


def test_host_without_limits(tmp_path: Path) -> None:
    assert free_host_memory(write(tmp_path, MEMINFO)) == 1000 * 1024


def test_limit_of_a_parent_group_v2(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/box"
    files = {
        "proc/self/cgroup": "0::/box/inner",
        f"{group}/inner/memory.max": "max",
        f"{group}/inner/memory.current": 10,
        f"{group}/memory.max": 500_000,
        f"{group}/memory.current": 450_000,
        f"{group}/memory.stat": "anon 5\ninactive_file 30000\nactive_file 7",
    }
    assert free_host_memory(write(tmp_path, MEMINFO | files)) == 80_000


def test_limit_inside_a_container_v1(tmp_path: Path) -> None:
    # The path is the host's; inside, the mount itself is the group.
    files = {
        "proc/self/cgroup": "5:cpu:/docker/abc\n4:hugetlb,memory:/docker/abc",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 300_000,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 100_000,
    }
    assert free_host_memory(write(tmp_path, MEMINFO | files)) == 200_000


def test_no_limit_v1_and_garbage(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/a",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 1,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 7,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "what",
    }
    assert free_host_memory(write(tmp_path, MEMINFO | files)) == 1000 * 1024


def test_used_more_than_the_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 100,
        "sys/fs/cgroup/memory.current": 200,
    }
    assert free_host_memory(write(tmp_path, MEMINFO | files)) == 0


def test_unknown_system(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--context"):
        free_host_memory(tmp_path)
