"""What people are told about the attention of a model: before loading, when it is loaded, and in warnings."""

from dataclasses import replace

import pytest
import torch
from tiny import by_name, write

import exl_runtime as exl
from exl_runtime.cache.types import cache_type
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.model import summary
from exl_runtime.model.attending import attention_lines, pages_like
from exl_runtime.ops.attention import choose
from exl_runtime.runtime.load import DEMO_FOLDER

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_flash_missing", lambda device: "flash-attn is not installed")


def test_each_choice_is_told_once_with_its_reason(tmp_path) -> None:
    spec = replace(resolve(load_config(write(by_name("gemma2"), tmp_path)).config, {}), head_dim=32)
    assert len({layer.window for layer in spec.layers}) == 2
    lines = attention_lines(spec, pages_like(spec, cache_type("fp16")), CUDA)
    assert lines == (
        "decoding: our own kernel (split over the context)",
        "prompts: our own kernel (flash-attn is not installed; torch has no softcap)",
    )
    (decoding, _) = attention_lines(spec, pages_like(spec, cache_type("k6v4")), CUDA)
    assert decoding == "decoding: our own kernel (reads 6-bit keys as they are stored)"
    slow = attention_lines(spec, pages_like(spec, cache_type("fp32")), CUDA)
    assert all("plain torch, slowly" in line for line in slow)


def test_exl_info_tells_where_there_is_a_card(monkeypatch) -> None:
    assert summary.summarize(DEMO_FOLDER).attention == () or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = summary.summarize(DEMO_FOLDER, cache="q4").attention
    assert told[0] == "decoding: our own kernel (reads 4-bit keys as they are stored)"


@pytest.mark.parametrize(("cache", "slow"), [("fp16", False), ("fp32", True)])
def test_loading_tells_it_and_warns_of_slow_attention(emulated, monkeypatch, caplog, cache, slow) -> None:
    lines: list[str] = []
    with (
        caplog.at_level("WARNING"),
        exl.load("demo", device="cpu", backend="cuda", cache=cache, context=256, progress=lines.append) as runtime,
    ):
        assert runtime.info.backend == "cuda"
    told = [line for line in lines if line.startswith(("decoding:", "prompts:"))]
    assert len(told) == 2 and all(("plain torch" in line) == slow for line in told)
    assert any("cache of fp16, bf16 or codes" in record.message for record in caplog.records) == slow
