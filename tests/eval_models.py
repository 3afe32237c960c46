"""Tiny models that can read: a tokenizer of one token per character beside the random weights of `tiny.py`."""

import json
import shutil
from pathlib import Path

import tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
BOS, EOS, UNKNOWN, FIRST = 1, 2, 3, 4  # FIRST: the id of the first character


def write_tokenizer(folder: Path, *, bos: bool) -> None:
    """tokenizer.json and tokenizer_config.json: FIRST + n is the n-th of CHARACTERS; with `bos`, BOS leads a text."""
    special = ("<pad>", "<s>", "</s>", "<unk>")
    vocab = {token: index for index, token in enumerate((*special, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.add_special_tokens(list(special))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": bos,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def reader(root: Path, family: str = "qwen2", *, bos: bool = True) -> Path:
    """The folder of a tiny model of `family` (see `tiny.FAMILIES`) with such a tokenizer, written once per root."""
    folder = root / f"{family}-{'bos' if bos else 'plain'}"
    if not folder.exists():
        shutil.copytree(tiny.write(tiny.by_name(family), root), folder)
        write_tokenizer(folder, bos=bos)
    return folder


def ids_of(text: str) -> list[int]:
    """What the tokenizer gives, without it."""
    return [CHARACTERS.index(char) + FIRST if char in CHARACTERS else UNKNOWN for char in text]
