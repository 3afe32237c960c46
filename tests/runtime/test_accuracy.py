"""Whole models by the packed CPU kernels against the reference: 8-bit inputs with a residual are as good as floats."""

from pathlib import Path

import pytest
import torch
from matrices import unrounded
from oracles import INPUT_ROUNDING

import exl_runtime as exl
from exl_runtime.formats.exl2 import Exl2
from exl_runtime.ops import native

PROMPTS = ("Once upon a time", "The dog", "In the garden", "Why is")
TOKENS = 500


def greedy(backend: str) -> tuple[list[list[int]], list[torch.Tensor]]:
    """For every prompt the likeliest tokens up to the end, and the logits of all of them."""
    replies, logits = [], []
    with exl.load(backend=backend, threads=1) as runtime:
        for text in PROMPTS:
            prompt = runtime.tokenizer.encode(text)
            reply = runtime.generate(prompt, max_tokens=TOKENS, sampling=exl.SamplingParams(temperature=0)).ids
            replies.append(list(reply))
            logits.append(runtime.logits([*prompt, *reply]))
    return replies, logits


def test_the_demo_says_the_same_for_500_greedy_tokens() -> None:
    if why := native.available():
        pytest.skip(why)
    (replies, logits), (wanted, oracles) = greedy("cpu"), greedy("reference")
    assert replies == wanted and sum(map(len, replies)) >= TOKENS
    log_p, log_q = torch.cat(oracles).double().log_softmax(-1), torch.cat(logits).double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    # The reference rounds the product of code and scale to half, which is several times what the input loses.
    assert float(divergence.mean()) < 1e-6 and float(divergence.max()) < 1e-5


@pytest.mark.parametrize("rounded", [True, False])
def test_logits_beside_the_weights_in_float(rounded: bool, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logit, relative to the largest. The format rounds code x scale to half, which packed kernels leave out.

    That is up to 2^-11 of a weight, 2e-4 of a product. What kernels do round, inputs, is 2.3e-5 of a product. Errors of
    layers are independent and a trained model damps them: the logits lose hardly more than one product.
    """
    if why := native.available():
        pytest.skip(why)
    ids = list(range(30, 230))
    with exl.load(demo, backend="cpu", threads=1, context=512) as runtime:
        ours = runtime.logits(ids).double()
    if not rounded:
        read = Exl2.dequantize
        monkeypatch.setattr(Exl2, "dequantize", lambda w: unrounded(w, read(w)).float())
    with exl.load(demo, backend="reference", threads=1, context=512) as runtime:
        oracle = runtime.logits(ids).double()
    off = float((ours - oracle).abs().max() / oracle.abs().max())
    assert off < (2**-11 if rounded else 4 * INPUT_ROUNDING)


def test_fast_prompts_are_a_little_off_and_single_tokens_are_not() -> None:
    if why := native.available():
        pytest.skip(why)
    ids = list(range(30, 230))
    found = {}
    for accuracy in ("exact", "fast"):
        with exl.load(accuracy=accuracy, threads=1, context=512) as runtime:
            found[accuracy] = (runtime.logits(ids).double().log_softmax(-1), runtime.logits(ids[:8]))
            assert runtime.info.accuracy == accuracy
    (exact, few), (fast, few_fast) = found["exact"], found["fast"]
    divergence = float((exact.exp() * (exact - fast)).sum(-1).mean())
    assert 1e-6 < divergence < 2e-3
    assert torch.equal(few, few_fast)
    with pytest.raises(exl.errors.UsageError, match="sloppy"):
        exl.load(accuracy="sloppy")
