"""Whole models by the packed CPU kernels against the reference: 8-bit inputs with a residual are as good as floats."""

import pytest
import torch

import exl_runtime as exl
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
