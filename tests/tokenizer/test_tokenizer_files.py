"""Broken tokenizer files: one TokenizerError each, naming the file."""

import json
import shutil
from pathlib import Path

import pytest

from exl_runtime.errors import TokenizerError
from exl_runtime.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def folder(demo: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path)
    return tmp_path


def small(**model: object) -> str:
    return json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []} | model})


BROKEN = {
    "empty": "",
    "blank": " \n",
    "not json": "hello",
    "binary": "\x00\x01\x02",
    "truncated": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a',
    "a list": "[]",
    "null": "null",
    "no model": "{}",
    "empty model": '{"model": {}}',
    "deep": "[" * 100_000,
    "deep object": '{"model":' * 5000,
    "lfs pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "unknown model": small(type="Magic"),
    "merge of unknown tokens": small(merges=["b c"]),
    "id too large": small(vocab={"a": 2**40}),
    "id far away": small(vocab={"a": 2**31}),
    "no vocabulary": small(vocab={}),
    "text as id": small(vocab={"a": "0"}),
    "unigram without pieces": small(type="Unigram", vocab=[]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_tokenizer_json(folder: Path, kind: str) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text(BROKEN[kind], "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.open(folder)


def test_not_utf8(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not UTF-8"):
        Tokenizer.open(folder)


def test_directory_in_place_of_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.open(folder)


CONFIGS = {
    "empty": "",
    "a list": "[]",
    "truncated": '{"bos_token": "<s',
    "deep": '{"a":' * 100_000,
    "number as token": '{"bos_token": 7}',
    "list as token": '{"eos_token": ["a"]}',
    "flag as text": '{"add_bos_token": "yes"}',
    "decoder as list": '{"added_tokens_decoder": []}',
    "decoder with words as ids": '{"added_tokens_decoder": {"x": {"content": "a"}}}',
    "decoder without content": '{"added_tokens_decoder": {"0": {}}}',
    "decoder with huge id": '{"added_tokens_decoder": {"99999999999": {"content": "a"}}}',
    "extra tokens as text": '{"additional_special_tokens": "<a>"}',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_broken_tokenizer_config(folder: Path, kind: str) -> None:
    (folder / "tokenizer_config.json").write_text(CONFIGS[kind], "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.open(folder)


def test_broken_added_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<x>": "2048"}')
    with pytest.raises(TokenizerError, match=r"added_tokens\.json"):
        Tokenizer.open(folder)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json"):
        Tokenizer.open(tmp_path)
    with pytest.raises(TokenizerError, match="not a folder"):
        Tokenizer.open(tmp_path / "absent")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(TokenizerError, match="sentencepiece") as caught:
        Tokenizer.open(tmp_path)
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize(
    ("vocab", "merges", "named"),
    [
        ("{", "a b\n", r"vocab\.json"),
        ("{}", "a b\n", r"vocab\.json"),
        ('{"a": 0, "b": 0}', "a b\n", r"vocab\.json"),
        ('{"a": "0"}', "a b\n", r"vocab\.json"),
        ('{"a": 0, "b": 1}', "a b c\n", r"merges\.txt line 1"),
        ('{"a": 0, "b": 1}', "a b\n", r"merges\.txt"),
        ('{"a": 0, "b": 1, "ab": 2}', "", r"merges\.txt"),
        ('{"a": 0, "b": 1, "ab": 2}', None, r"merges\.txt"),
        (None, "a b\n", r"vocab\.json"),
    ],
)
def test_broken_vocab_and_merges(tmp_path: Path, vocab: str | None, merges: str | None, named: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for name, text in (("vocab.json", vocab), ("merges.txt", merges)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=named):
        Tokenizer.open(tmp_path)


def test_a_panic_of_the_library_is_an_error(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    value["decoder"] = {"type": "Strip", "content": "a", "start": 2, "stop": 2}
    (folder / "tokenizer.json").write_text(json.dumps(value), "utf-8")
    tokenizer = Tokenizer.open(folder)
    with pytest.raises(TokenizerError, match="decoding failed"):
        tokenizer.decode([tokenizer.id_of("a")])
