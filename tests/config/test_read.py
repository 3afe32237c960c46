"""Broken configuration files: one clear ConfigError that names the file, whatever is wrong with it."""

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exl_runtime.config import load_config
from exl_runtime.config.read import MAX_BYTES
from exl_runtime.errors import ConfigError


def write(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(data), None)[1]


def too_large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere.json")


def loop(path: Path) -> None:
    path.symlink_to(path)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (write(b""), "empty"),
    "white space": (write(b" \n\t "), "empty"),
    "cut off": (write(b'{"hidden_size": 12'), "not valid JSON"),
    "text after the object": (write(b'{"a": 1} {"a": 1}'), "Extra data"),
    "twice the same key": (write(b'{"a": 1, "a": 2}'), "appears twice"),
    "not UTF-8": (write(b'{"a": "\xff\xfe"}'), "UTF-8"),
    "UTF-16": (write('{"a": 1}'.encode("utf-16")), "UTF-8"),
    "binary": (write(bytes(range(256))), "not"),
    "web page": (write(b"<!DOCTYPE html><html>404</html>"), "not valid JSON"),
    "LFS pointer": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "LFS"),
    "list": (write(b"[1, 2]"), "JSON object"),
    "text": (write(b'"config"'), "JSON object"),
    "null": (write(b"null"), "JSON object"),
    "deep lists": (write(b"[" * 200_000), "nested too deeply"),
    "deep objects": (write(b'{"a":' * 200_000), "nested too deeply"),
    "NaN": (write(b'{"rms_norm_eps": NaN}'), "NaN"),
    "infinity": (write(b'{"rms_norm_eps": -Infinity}'), "Infinity"),
    "endless number": (write(b'{"a": ' + b"9" * 100_000 + b"}"), "not valid JSON"),
    "null bytes": (write(b"\0" * 100), "not valid JSON"),
    "too large": (too_large, "more than"),
    "folder in its place": (lambda path: path.mkdir(), "not a regular file"),
    "pipe in its place": (lambda path: os.mkfifo(path), "not a regular file"),
    "broken link": (dangling, "link"),
    "link to itself": (loop, "cannot be read"),
}
GOOD = b'{"architectures": ["LlamaForCausalLM"]}'


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "quantize_config.json", "quant_config.json"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file(kind: str, name: str, tmp_path: Path) -> None:
    make, words = BROKEN[kind]
    (tmp_path / "config.json").write_bytes(GOOD)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


def test_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        load_config(tmp_path / "nowhere")


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"model\.safetensors: a file, not a folder"):
        load_config(tmp_path / "model.safetensors")


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(tmp_path / "a" / "b")


def test_impossible_path() -> None:
    with pytest.raises(ConfigError, match="not a path"):
        load_config("model\0name")


@pytest.mark.parametrize(
    ("beside", "words"), [("", "config.json"), ("model.gguf", "GGUF"), ("model.safetensors", "download config.json")]
)
def test_no_config(beside: str, words: str, tmp_path: Path) -> None:
    if beside:
        (tmp_path / beside).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no config\.json") as caught:
        load_config(tmp_path)
    assert words in str(caught.value)


def test_config_one_folder_deeper(tmp_path: Path) -> None:
    (tmp_path / "model-4.0bpw").mkdir()
    (tmp_path / "model-4.0bpw" / "config.json").write_bytes(GOOD)
    with pytest.raises(ConfigError, match=r"did you mean .*model-4\.0bpw"):
        load_config(tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_bytes(GOOD)
    real = builtins.open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith("config.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: Permission denied"):
        load_config(tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        load_config(tmp_path)


def test_quantization_config_must_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": [4]}')
    with pytest.raises(ConfigError, match=r'quantization_config" must be an object, is \[4\]'):
        load_config(tmp_path)


def test_quantization_is_merged_in_search_order(tmp_path: Path) -> None:
    def put(name: str, value: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(value))

    put("config.json", {"quantization_config": {"bits": 2, "sym": True, "checkpoint_format": "gptq_v2"}})
    assert load_config(tmp_path).quantization == {"bits": 2, "sym": True, "checkpoint_format": "gptq_v2"}
    put("quant_config.json", {"bits": 3, "group_size": 32, "sym": False})
    put("quantize_config.json", {"bits": 4, "group_size": 128})
    assert load_config(tmp_path).quantization == {
        "bits": 4,
        "group_size": 128,
        "sym": False,
        "checkpoint_format": "gptq_v2",
    }
    put("config.json", {"quantization_config": None})
    (tmp_path / "quant_config.json").unlink()
    (tmp_path / "quantize_config.json").unlink()
    assert load_config(tmp_path).quantization == {}


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + GOOD)  # some editors put a byte order mark
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "a": {"b": 1, "b": 1}}')
    files = load_config(str(tmp_path))
    assert files.folder == tmp_path
    assert files.config == {"architectures": ["LlamaForCausalLM"]}
    assert files.generation == {"eos_token_id": [1, 2], "a": {"b": 1}}
    assert files.quantization == {}
    (tmp_path / "generation_config.json").unlink()
    assert load_config(tmp_path).generation == {}


def test_links_are_followed(tmp_path: Path) -> None:
    """Download caches keep the files elsewhere and link to them."""
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    assert load_config(tmp_path).config["architectures"] == ["LlamaForCausalLM"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]":,1e-nul\\ ', max_size=40).map(str.encode)))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    try:
        assert isinstance(load_config(tmp_path).config, dict)
    except ConfigError as err:
        assert "config.json" in str(err)
