"""The options around the tiers: --host-cache, --save-kv, and what /stats and /mem tell."""

import argparse
from importlib import import_module
from pathlib import Path

import pytest
from talking import Recorder

import exl_runtime as exl
from exl_runtime.chat import store
from exl_runtime.chat.commands import Conversation, handle
from exl_runtime.chat.kv import kv_path
from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.cli.options import bytes_or_auto

GREEDY = ReplySettings(max_tokens=4, sampling=exl.SamplingParams(temperature=0))


def test_sizes_of_the_host_cache() -> None:
    assert [bytes_or_auto(text) for text in ("auto", "0", "77", "8G", "512m", "3K", "1T")] == [
        "auto",
        0,
        77,
        8 << 30,
        512 << 20,
        3 << 10,
        1 << 40,
    ]
    for wrong in ("", "G", "-1", "1.5G", "8GB", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size"):
            bytes_or_auto(wrong)
    with pytest.raises(exl.errors.UsageError, match="host_cache"):
        exl.load("demo", host_cache=-1)


def test_host_memory_gives_back_what_left_the_cache_token_for_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with room for one conversation: two take turns, with and without a tier below."""
    monkeypatch.setattr(import_module("exl_runtime.runtime.load"), "cache_pages", lambda *args, **rest: 2)
    prompts = [list(range(10 + k, 310 + k)) for k in (0, 500, 0, 500)]
    told = []
    for host_cache in (0, 64 << 20):
        with exl.load("demo", context=512, threads=1, host_cache=host_cache) as rt:
            results = [rt.generate(p, max_tokens=4, sampling=exl.SamplingParams(temperature=0)) for p in prompts]
            told.append(([r.ids for r in results], results[2].reused_tokens, results[3].reused_tokens, rt.stats))
    (plain, *few, _), (kept, *many, stats) = told
    assert kept == plain
    assert few == [0, 0] and many == [299, 299]
    assert stats.reused_from_host == 598 and 0 < stats.host_cache_bytes <= 64 << 20 and stats.evictions >= 2


def test_stats_and_mem_tell_of_it() -> None:
    with exl.load("demo", context=512, threads=1) as rt:
        chat = Conversation(session=ChatSession(rt, settings=GREEDY), screen=Recorder())
        chat.session.send("Hello!")
        chat.session.regenerate()
        handle(chat, "/stats")
        handle(chat, "/mem")
    rows = chat.screen.said("table")
    for text in ("reused from host", "reused from disk", "evictions", "prompt tokens not computed", "host memory"):
        assert text in rows


def test_save_kv_writes_beside_the_kept_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = store.new_path()
    with exl.load("demo", context=512, threads=1) as rt:
        session = ChatSession(rt, settings=GREEDY)
        session.keep(path)
        session.kv.auto = True
        session.send("Hello!")
        session.close()
    assert kv_path(path).stat().st_size > 10_000 and store.paths() == [path]
