"""The adapter of examples/ behind a stand-in for the harness: what lm_eval's documentation of `LM` asks for."""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import exl_runtime as exl

ADAPTER = Path(__file__).resolve().parents[2] / "examples" / "lm_eval_adapter.py"
CONTEXT = 24


def asked(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def lm():
    class LM:
        def __init__(self) -> None:
            self.started = True

    names = {"lm_eval": {"simple_evaluate": None}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM}}
    before = {name: sys.modules.get(name) for name in names}
    for name, content in names.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(content)
    try:
        adapter = runpy.run_path(str(ADAPTER))["ExlLM"]
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    assert issubclass(adapter, LM)
    model = adapter("demo", threads=1, context=CONTEXT)
    assert model.started
    with model.rt:
        yield model


def logprobs(rt: exl.Runtime, ids: list[int]) -> torch.Tensor:
    """(len(ids) - 1,) of each token but the first, and whether it is the likeliest, in float64."""
    scores = rt.logits(ids[:-1]).double()
    wanted = torch.tensor(ids[1:])
    values = scores.gather(1, wanted[:, None]).squeeze(1) - scores.logsumexp(dim=1)
    return torch.stack((values, (scores.argmax(dim=1) == wanted).double()))


def test_loglikelihood_is_the_sum_over_the_continuation(lm) -> None:
    encode = lm.rt.tokenizer.encode
    pairs = [("The capital of France is", " Paris"), ("The capital of France is ", "Paris"), ("Once", " upon a time")]
    results = lm.loglikelihood([asked(*pair) for pair in pairs])
    for (context, continuation), (value, greedy) in zip(pairs, results, strict=True):
        whole = encode(context + continuation)
        table = logprobs(lm.rt, whole)[:, len(encode(context.rstrip())) - 1 :]
        assert value == pytest.approx(table[0].sum().item(), abs=1e-4) and greedy == bool(table[1].all())
    assert results[0][0] == pytest.approx(results[1][0])  # a blank at the end belongs to the continuation


def test_an_empty_context_is_the_prefix_token(lm) -> None:
    ids = [lm.rt.tokenizer.bos_id, *lm.rt.tokenizer.encode("Once upon")]
    ((value, _),) = lm.loglikelihood([asked("", "Once upon")])
    assert value == pytest.approx(logprobs(lm.rt, ids)[0].sum().item(), abs=1e-4)


def test_greedy_is_told(lm) -> None:
    text = lm.generate_until([asked("Once upon a", {"until": ["."], "max_gen_toks": 4})])[0]
    assert lm.loglikelihood([asked("Once upon a", text)])[0][1] is True
    assert lm.loglikelihood([asked("Once upon a", " zzqx")])[0][1] is False


def test_a_long_context_loses_its_beginning(lm) -> None:
    encode = lm.rt.tokenizer.encode
    ids = encode("word " * 40 + "end")[-CONTEXT - 1 :]
    ((value, _),) = lm.loglikelihood([asked("word " * 40, "end")])
    cut = len(encode("word " * 40 + "end")) - len(encode(("word " * 40).rstrip()))
    assert value == pytest.approx(logprobs(lm.rt, ids)[0][-cut:].sum().item(), abs=1e-4)


@pytest.mark.parametrize("words", [3, 30, 61])
def test_rolling_predicts_each_token_once_with_all_the_context_there_is(lm, words) -> None:
    ids = [lm.rt.tokenizer.bos_id, *lm.rt.tokenizer.encode("fox " * words)]
    total, done = 0.0, 1
    while done < len(ids):  # the windows of LM.loglikelihood_rolling: full ones, the last one moved back
        end = min(done + CONTEXT, len(ids))
        window = ids[max(0, end - CONTEXT - 1) : end]
        total += logprobs(lm.rt, window)[0][-(end - done) :].sum().item()
        done = end
    assert lm.loglikelihood_rolling([asked("fox " * words)]) == [pytest.approx(total, abs=1e-3)]


def test_generation_stops_and_is_bounded(lm) -> None:
    long, stopped = lm.generate_until(
        [
            asked("Once upon a time", {"max_gen_toks": 5}),
            asked("Once upon a time", {"until": ["a"], "max_gen_toks": 20}),
        ]
    )
    assert len(lm.rt.tokenizer.encode(long)) <= 6 and "a" not in stopped
    assert lm.generate_until([asked("word " * 100, {"until": ".", "max_gen_toks": 2})])  # cut to the context
