"""Small files as published folders have them: lists instead of values, roles in the older file, ends in odd places."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import exl_runtime as exl

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = exl.SamplingParams(temperature=0)
ROLES = ("bos_token", "eos_token", "pad_token")


@pytest.fixture
def folder(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "model"))


def edit(folder: Path, name: str, **values: Any) -> dict[str, Any]:
    """Set keys of a JSON file (None: remove the key); what was there before."""
    path = folder / name
    before = json.loads(path.read_text("utf-8"))
    after = {key: value for key, value in {**before, **values}.items() if value is not None}
    path.write_text(json.dumps(after), "utf-8")
    return before


def answer(folder: Path) -> exl.Result:
    with exl.load(folder, backend="reference", context=256) as runtime:
        return runtime.generate(QUESTION, max_tokens=40, sampling=GREEDY)


def test_roles_and_templates_in_their_older_places(folder: Path) -> None:
    """special_tokens_map.json and added_tokens.json instead of tokenizer_config.json; templates as a list."""
    wanted = answer(folder)
    config = edit(folder, "tokenizer_config.json", **dict.fromkeys((*ROLES, "added_tokens_decoder", "add_bos_token")))
    added = config["added_tokens_decoder"]
    roles = {role: {"content": config[role], "lstrip": False, "normalized": True} for role in ROLES}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    (folder / "added_tokens.json").write_text(json.dumps({token["content"]: int(i) for i, token in added.items()}))
    templates = [
        {"name": "tool_use", "template": "{{ raise_exception('not this one') }}"},
        {"name": "default", "template": config["chat_template"]},
    ]
    edit(folder, "tokenizer_config.json", chat_template=templates)
    (folder / "chat_template.jinja").unlink()
    result = answer(folder)
    assert (result.ids, result.stop_reason) == (wanted.ids, "eos") and "Paris" in result.text


@pytest.mark.parametrize("generation", [[0, 2], 2, None], ids=str)
def test_ends_in_any_file(generation: Any, folder: Path) -> None:
    edit(folder, "config.json", eos_token_id=[2047, 2] if generation is None else 2047)
    edit(folder, "generation_config.json", eos_token_id=generation)
    edit(folder, "tokenizer_config.json", eos_token="<|pad|>")
    result = answer(folder)
    assert result.stop_reason == "eos" and result.ids[-1] == 2


def test_a_fine_tune_that_told_only_its_tokenizer(folder: Path) -> None:
    edit(folder, "config.json", eos_token_id=2047)
    edit(folder, "generation_config.json", eos_token_id=2047)
    result = answer(folder)
    assert result.stop_reason == "eos" and result.ids[-1] == 2
