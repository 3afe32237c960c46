"""When a finished model is tuned end to end, and what is said about it."""

import json
from pathlib import Path

import pytest
from converting import convert, in_a_hurry, options, small_model

from convert import tuning


@pytest.mark.parametrize(("tokens", "said"), [(0, ("tuned end to end", "did not help")), (10**9, ("was not tried",))])
def test_too_few_held_out_tokens_decide_nothing(
    tokens: int, said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_a_hurry():
        monkeypatch.setattr(tuning, "GUARD_TOKENS", tokens)
        convert(options(small_model("llama", tmp_path), tmp_path / "out"))
    protocol = json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]
    assert any(text in protocol for text in said), protocol


def test_rows_that_decide_are_not_those_that_judge() -> None:
    rows = list(range(9))
    assert not set(tuning.guard_rows(rows)) & set(tuning.judge_rows(rows))
    assert sorted(tuning.guard_rows(rows) + tuning.judge_rows(rows)) == rows
