"""Damaged adapters: whatever is in the two files, loading works or says in one error what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from adapter_cases import CASES, made
from adapters import Driven
from driving import open_model, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import by_name, model_of, write

from exl_runtime.errors import ExlError
from exl_runtime.model.adapter_loading import load_adapter
from exl_runtime.model.lora import mix_of

NAMES = (
    "dora",
    "all biases",
    "an embedding and the head",
    "single tokens",
    "whole modules",
    "stacked experts and routers",
)
JUNK = st.sampled_from([None, True, 0, -1, 3, 2.5, 1e300, "", "x", [], [1], [1.5], ["q"], {}, {"q_proj": 2}, {"(": 1}])
KEYS = st.sampled_from(
    (
        *(
            "r",
            "lora_alpha",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "use_dora",
            "lora_bias",
            "peft_type",
            "bias",
        ),
        *("trainable_token_indices", "target_parameters", "modules_to_save", "init_lora_weights", "fan_in_fan_out"),
    )
)
TENSORS = {
    "drop": lambda t: None,
    "flatten": lambda t: t.flatten(),
    "scalar": lambda t: torch.ones(()),
    "transpose": lambda t: t.t().contiguous() if t.dim() == 2 else t[None],
    "cut": lambda t: t[:-1].contiguous() if t.dim() and len(t) > 1 else t,
    "empty": lambda t: t[:0],
    "twice": lambda t: torch.cat([t, t]) if t.dim() else t,
    "nan": lambda t: t * float("nan"),
    "huge": lambda t: t * 1e30,
    "zero": lambda t: t * 0,
    "integers": lambda t: t.to(torch.int32),
    "half": lambda t: t.half(),
    "deep": lambda t: t[None],
}
RENAMES = (
    ("lora_A", "lora_B"),
    ("lora_B", "lora_embedding_B"),
    (".weight", ".bias"),
    ("q_proj", "input_layernorm"),
    ("layers.0", "layers.7"),
    ("lm_head", "model.embed_tokens"),
    ("embed_tokens", "norm"),
    ("experts", "experts.base_layer"),
    (".weight", ".base_layer.weight"),
    (".lora_A", ".token_adapter.trainable_tokens_delta.lora_A"),
    ("self_attn", "mlp.experts.0"),
    ("gate", "experts"),
)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory):
    """(model, folder of a sound adapter, its tensors) of each name."""
    root = tmp_path_factory.mktemp("broken")
    found = {}
    for name in NAMES:
        family = by_name(CASES[name][0])
        folder = made(name, model_of(family)).write(root / name.replace(" ", "-"))
        model = open_model(write(family, root), "reference")
        found[name] = (model, folder, load_file(folder / "adapter_model.safetensors"))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_in_words_or_none(data: st.DataObject, worked, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(NAMES))
    model, folder, tensors = worked[name]
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= data.draw(st.dictionaries(KEYS, JUNK, max_size=2))
    changed = dict(tensors)
    for victim in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        kind = data.draw(st.sampled_from([*TENSORS, "rename"]))
        tensor = changed.pop(victim, tensors[victim])
        if kind == "rename":
            old, new = data.draw(st.sampled_from(RENAMES))
            changed[victim.replace(old, new)] = tensor
        elif (now := TENSORS[kind](tensor)) is not None:
            changed[victim] = now
    out = tmp_path / "adapter"
    out.mkdir(exist_ok=True)
    save_file({key: t.contiguous() for key, t in changed.items()}, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config))
    try:
        adapter = load_adapter(out, model)
    except ExlError as err:
        assert str(err) and "Traceback" not in str(err)
        return
    try:  # what loads also runs, or says that its numbers are too large
        logits = run(Driven(model, mix_of([(adapter, 1.0)])), [5, 9, 14, 7], [])
    except ExlError as err:
        assert "NaN or infinity" in str(err)
        return
    assert logits.isfinite().all()
