"""peft itself agrees with tests/adapter_cases.py; skipped where it is not installed (`pip install peft`)."""

import warnings

import pytest
import torch
from adapter_cases import CASES, OLD_NAMES, changed, made
from tiny import by_name, model_of

peft = pytest.importorskip("peft")
IDS = torch.tensor([[(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(40)]])


@pytest.mark.parametrize("name", [name for name in CASES if name not in OLD_NAMES])
def test_peft_reads_the_case_and_agrees(name, tmp_path) -> None:
    family = by_name(CASES[name][0])
    case = made(name, model_of(family))
    oracle = changed(model_of(family), [(case, 1.0)])(IDS, use_cache=False).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(
            model_of(family).double(), case.write(tmp_path), autocast_adapter_dtype=False
        )
    assert not [str(w.message) for w in said if "adapter keys" in str(w.message)], (
        "names that peft does not know, or misses"
    )
    found = model.eval()(IDS, use_cache=False).logits
    # The adapter's own tensors are float32; peft may multiply them in it.
    assert (found - oracle).abs().max() <= 2e-5 * oracle.abs().max()
