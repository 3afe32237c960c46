"""What a load takes on a card whose free memory is made up: the figures of `exl info` for a device of type cuda."""

import pytest

import exl_runtime as exl
from exl_runtime.cache import storage
from exl_runtime.errors import OutOfMemory
from exl_runtime.model import placement, summary

MIB = 1 << 20


def pretend(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    for module in (placement, storage, summary):
        monkeypatch.setattr(module, "free_memory", lambda device: free)


@pytest.mark.parametrize("free", [20 * MIB, 60 * MIB, 8192 * MIB])
@pytest.mark.parametrize("context", [None, 512])
def test_info_and_load_agree(emulated, demo, monkeypatch, free: int, context: int | None) -> None:
    """Weights as the kernels hold them are within a few percent of those on disk."""
    pretend(monkeypatch, free)
    said = summary.summarize(demo, context, device="cuda")
    assert said.cache_dtype == "fp16" and said.load_cache_bytes
    # The load asks what is free after the weights are there.
    pretend(monkeypatch, free - said.weight_bytes)
    with exl.load(demo, device="cpu", backend="cuda", cache="fp16", context=context or "auto", threads=1) as rt:
        info = rt.info
        one = info.cache_bytes / rt.stats.pages_total
    assert info.backend == "cuda"
    assert abs(info.weight_bytes - said.weight_bytes) <= 0.05 * said.weight_bytes
    assert info.context == said.load_context
    assert abs(info.cache_bytes - said.load_cache_bytes) <= one
    assert info.weight_bytes + info.cache_bytes <= free
    assert said.load_context == 1024 or free < 100 * MIB or context == 512


def test_a_card_too_small_is_known_before_anything_is_read(emulated, demo, monkeypatch) -> None:
    pretend(monkeypatch, 6 * MIB)
    assert not summary.summarize(demo, 512, device="cuda").load_cache_bytes
    with pytest.raises(OutOfMemory, match="too little for weights"):
        exl.load(demo, device="cpu", backend="cuda", cache="fp16", context=512, threads=1)
