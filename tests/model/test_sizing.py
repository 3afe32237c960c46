"""What a load takes from the memory that is free, and what `exl info` says of it beforehand."""

import json
from importlib import import_module

import pytest

import exl_runtime as exl
from exl_runtime.cache import storage
from exl_runtime.cli.main import main
from exl_runtime.errors import OutOfMemory
from exl_runtime.model import placement, summary
from exl_runtime.runtime import draft

MIB = 1 << 20


def pretend(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    for module in (placement, storage, summary):
        monkeypatch.setattr(module, "free_memory", lambda device: free)


@pytest.fixture(scope="module")
def weights(demo) -> int:
    """Bytes of the weights in memory."""
    with exl.load(demo, context=256, threads=1) as rt:
        return rt.info.weight_bytes


@pytest.mark.parametrize("free", [30 * MIB, 45 * MIB, 90 * MIB, 400 * MIB, 8192 * MIB])
@pytest.mark.parametrize("cache", ["fp32", "q8", "k6v4"])
@pytest.mark.parametrize("context", [None, 512])
def test_info_and_load_agree(demo, monkeypatch, weights: int, free: int, cache: str, context: int | None) -> None:
    """Within a few percent, as the weights on disk differ a little from those in memory."""
    pretend(monkeypatch, free)
    said = summary.summarize(demo, context, cache=cache)
    pretend(monkeypatch, free - weights)
    wanted = "auto" if context is None else context
    if not said.load_cache_bytes:
        with pytest.raises(OutOfMemory):
            exl.load(demo, cache=cache, context=wanted, threads=1)
        return
    with exl.load(demo, cache=cache, context=wanted, threads=1) as rt:
        page = placement.PAGE_SIZE
        assert abs(rt.info.context - said.load_context) <= max(page, 0.05 * said.load_context)
        one = rt.info.cache_bytes / rt.stats.pages_total
        assert abs(rt.info.cache_bytes - said.load_cache_bytes) <= max(one, 0.05 * said.load_cache_bytes)
        assert said.load_cache_bytes >= said.cache_bytes or said.load_context < said.context
        assert rt.info.weight_bytes + rt.info.cache_bytes <= free


def test_little_memory_is_a_short_context_and_none_an_error(demo, monkeypatch) -> None:
    lengths = []
    for free in (20 * MIB, 40 * MIB, 4096 * MIB):
        pretend(monkeypatch, free)
        with exl.load(demo, threads=1) as rt:
            lengths.append(rt.info.context)
    assert lengths[0] < lengths[1] <= lengths[2] == 1024
    pretend(monkeypatch, MIB)
    with pytest.raises(OutOfMemory, match="too little"):
        exl.load(demo, threads=1)


@pytest.mark.parametrize(("free", "context"), [(MIB, "auto"), (MIB, 300), (10 * MIB, 1024)])
def test_what_cannot_fit_is_said_before_anything_is_read(demo, monkeypatch, free: int, context: int | str) -> None:
    pretend(monkeypatch, free)
    module = import_module("exl_runtime.runtime.load")
    monkeypatch.setattr(module, "load_transformer", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(
        OutOfMemory, match=r"GiB are free on cpu, too little for weights of 0.00 GiB and 0\.\d\d GiB of"
    ):
        exl.load(demo, threads=1, context=context, cache="fp32")
    said = summary.summarize(demo, None if context == "auto" else context, cache="fp32")
    assert not said.load_cache_bytes, "exl info says the same"


@pytest.mark.parametrize(("cache", "free"), [("fp32", 40 * MIB), ("q4", 80 * MIB)])
def test_a_draft_model_has_room_beside_it(demo, monkeypatch, weights: int, cache: str, free: int) -> None:
    """Each page of the one comes with a page of the other, which has exact keys and values here."""
    pretend(monkeypatch, free)
    monkeypatch.setattr(draft, "free_memory", lambda device: free)
    with exl.load(demo, threads=1, cache=cache) as rt:
        alone = rt.info.cache_bytes
    with exl.load(demo, threads=1, cache=cache, draft=demo) as rt:
        drafter = rt._engine()._speculator.drafter
        assert rt.info.cache_bytes < alone
        # The made-up memory is what is free behind the model's own weights.
        assert weights + drafter.kv.nbytes + rt.info.cache_bytes <= free
        assert drafter.kv.counts == rt._engine().kv.counts
    monkeypatch.setattr(draft, "free_memory", lambda device: 2 * MIB)
    with pytest.raises(OutOfMemory, match="too little"):
        exl.load(demo, threads=1, cache=cache, draft=demo)


def test_info_tells_both_sizes(capsys) -> None:
    assert main(["info", "demo", "--context", "512", "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    with exl.load("demo", context=512, device="cpu", threads=1) as rt:
        assert told["load_cache_bytes"] == rt.info.cache_bytes > told["cache_bytes"]
    assert main(["info", "demo", "--device", "cpu"]) == 0
    assert "what a load takes now" in " ".join(capsys.readouterr().out.split())
