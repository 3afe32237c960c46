"""Log-probabilities of windows: the right rows, in parts, against transformers; and what cannot be scored."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import eval_models
import pytest
import tiny
import torch
from torch import Tensor

import exl_runtime as exl
from eval import scoring
from eval.protocol import Window
from eval.scoring import score, token_nll
from exl_runtime.errors import EvalError, PromptTooLong, UsageError

IDS = tuple((7 * i * i + 3 * i + 11) % 96 + 4 for i in range(90))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def runtime(root: Path):
    with exl.load(eval_models.reader(root), threads=1, context=256) as opened:
        yield opened


@pytest.mark.parametrize("first", [1, 2, 45, 89])
@pytest.mark.parametrize("block", [1, 1000, 2**24])
def test_scores_are_the_log_softmax_before_each_scored_token(
    runtime, first: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BLOCK", block)
    expected = torch.log_softmax(tiny.logits_of(tiny.model_of(tiny.by_name("qwen2")), list(IDS)).double(), dim=1)
    seen: list[Tensor] = []
    places: list[int] = []

    def visit(positions: slice, logprobs: Tensor) -> None:
        assert logprobs.dtype == torch.float32 and logprobs.shape == (positions.stop - positions.start, 131)
        places.extend(range(positions.start, positions.stop))
        seen.append(logprobs.clone())

    score(runtime, Window(IDS, first), visit)
    assert places == list(range(len(IDS) - first))
    ours = torch.cat(seen)
    assert (ours - expected[first - 1 : -1]).abs().max() < 1e-4
    nll = token_nll(runtime, Window(IDS, first))
    assert nll.dtype == torch.float64 and nll.shape == (len(IDS) - first,)
    rows = torch.arange(first - 1, len(IDS) - 1)
    assert (nll + expected[rows, torch.tensor(IDS[first:])]).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama_dynamic", "phi3_longrope"])
def test_rope_that_depends_on_the_length_sees_the_whole_window(family: str, root: Path) -> None:
    """At 48 and 64 tokens another rope begins: one token less would be another model."""
    length = {"llama_dynamic": 49, "phi3_longrope": 65}[family]
    ids = IDS[:length]
    logits = tiny.logits_of(tiny.model_of(tiny.by_name(family)), list(ids)).double()
    expected = -torch.log_softmax(logits, dim=1)[torch.arange(length - 1), torch.tensor(ids[1:])]
    with exl.load(eval_models.reader(root, family), threads=1, context=256) as opened:
        assert (token_nll(opened, Window(ids, 1)) - expected).abs().max() < 1e-4


def broken(logits: Callable[[int], Tensor]) -> SimpleNamespace:
    """A runtime that gives its logits three at a time."""

    def each_logits(ids: Sequence[int], visit: Callable[[int, Tensor], None], *, first: int) -> None:
        for start in range(first, len(ids), 3):
            visit(start, torch.stack([logits(at) for at in range(start, min(start + 3, len(ids)))]))

    return SimpleNamespace(info=SimpleNamespace(name="broken-model"), each_logits=each_logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_one_line(value: float) -> None:
    def logits(at: int) -> Tensor:
        row = torch.zeros(8)
        row[5] = value if at == 7 else 0.0
        return row

    with pytest.raises(
        EvalError, match="broken-model: NaN or infinite logits after token 7 of a window of 20"
    ) as caught:
        token_nll(broken(logits), Window((1,) * 20, 3))
    assert "\n" not in caught.value.problem and caught.value.hint
    # Where nothing is scored nobody looks: the row after the last token predicts nothing of the window.
    assert len(token_nll(broken(logits), Window((1,) * 8, 3))) == 5


def test_a_token_that_the_model_lacks_is_one_line(runtime) -> None:
    with pytest.raises(EvalError, match=r"qwen2-bos: 131 is not a token id of this model \(0 to 130\)") as caught:
        token_nll(runtime, Window((5, 6, 131, 7), 1))
    assert "its tokenizer belongs to another model" in (caught.value.hint or "")


def test_a_window_longer_than_the_context_is_one_line(runtime) -> None:
    with pytest.raises(PromptTooLong, match="300 tokens were given, the context holds 1 to 256"):
        token_nll(runtime, Window((5,) * 300, 1))


def test_a_refusal_of_the_runtime_keeps_its_words() -> None:
    def refuse(ids: Sequence[int], visit: Callable[[int, Tensor], None], *, first: int) -> None:
        raise UsageError("this runtime is closed", hint="load the model again")

    closed = SimpleNamespace(info=SimpleNamespace(name="m"), each_logits=refuse)
    with pytest.raises(EvalError, match="m: this runtime is closed") as caught:
        token_nll(closed, Window((1, 2), 1))
    assert caught.value.hint == "load the model again"
