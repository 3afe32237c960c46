"""From the files of a model folder to a `tokenizers.Tokenizer`.

Three kinds of folder exist: tokenizer.json (complete), vocab.json + merges.txt (a byte-level BPE whose splitting
rule depends on the class named in tokenizer_config.json), and tokenizer.model (sentencepiece: not read here).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import TokenizerError
from .files import exists, read_json, read_text
from .sanity import require_charsmaps, require_sane_stages
from .special import SpecialTokens

T = TypeVar("T")

# Splitting rules by tokenizer class; a data file, because the keys name model families.
_CLASSES = Path(__file__).with_name("byte_bpe_classes.json")
MAX_ID = 2**24  # ids beyond this are a broken file: tables are sized by the largest id


def build_backend(folder: Path, special: SpecialTokens) -> tokenizers.Tokenizer:
    """The tokenizer of `folder`, declared tokens included. Raises TokenizerError naming the file at fault."""
    if not os.path.isdir(folder):
        raise TokenizerError(f"{folder} is not a folder", hint="give the folder that holds tokenizer.json")
    path = folder / "tokenizer.json"
    if exists(path):
        text = read_text(path)
        require_charsmaps(text, path)
        backend = guarded(lambda: tokenizers.Tokenizer.from_str(text), f"{path} is not a usable tokenizer")
        guarded(lambda: require_sane_stages(backend, path), f"{path} is not a usable tokenizer")
    elif exists(folder / "vocab.json") or exists(folder / "merges.txt"):
        path = folder / "vocab.json"
        backend = _from_vocab_and_merges(folder, special)
    elif exists(folder / "tokenizer.model"):
        raise TokenizerError(
            f"{folder} holds only tokenizer.model (sentencepiece); tokenizer.json is needed",
            hint="convert it once, with transformers, sentencepiece and protobuf installed: "
            f"python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\" , or copy tokenizer.json from the original model",
        )
    else:
        raise TokenizerError(
            f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json + merges.txt",
            hint="copy tokenizer.json and tokenizer_config.json from the original model",
        )
    backend.no_truncation()
    backend.no_padding()
    guarded(lambda: _add_declared(backend, special, path), f"{path}: its added tokens cannot be used")
    return backend


def guarded(action: Callable[[], T], problem: str) -> T:
    """Run `action` in the Rust library; whatever it throws becomes TokenizerError(problem: reason).

    Panics arrive as a class that derives from BaseException, so that name is looked for there.
    """
    try:
        return action()
    except TokenizerError:
        raise
    except Exception as err:
        raise TokenizerError(f"{problem}: {err}", hint="download the file again") from err
    except BaseException as err:
        if type(err).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{problem}: {err}", hint="download the file again") from err


def _from_vocab_and_merges(folder: Path, special: SpecialTokens) -> tokenizers.Tokenizer:
    name = special.tokenizer_class
    rules = json.loads(_CLASSES.read_text(encoding="utf-8"))
    if name is None or name.removesuffix("Fast") not in rules:
        raise TokenizerError(
            f"{folder} has no tokenizer.json, and how to split text for tokenizer class {name!r} is not known here"
            f" (known: {', '.join(sorted(rules))})",
            hint="copy tokenizer.json from the original model",
        )
    rule = rules[name.removesuffix("Fast")]
    vocab = _vocab(folder / "vocab.json")
    merges_path = folder / "merges.txt"
    merges = _merges(merges_path)
    model = guarded(lambda: models.BPE(vocab=vocab, merges=merges), f"{merges_path} does not fit vocab.json")
    backend = tokenizers.Tokenizer(model)
    if rule["normalizer"] is not None:
        backend.normalizer = getattr(normalizers, rule["normalizer"])()
    if rule["split"] is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rule["split"]), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    ids = set(vocab.values()) if all(_plain_int(index) for index in vocab.values()) else set()
    if not vocab or len(ids) != len(vocab) or min(ids) < 0 or max(ids) >= MAX_ID:
        raise TokenizerError(f"{path} must map every token to its own id (a whole number from 0)")
    return vocab


def _plain_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise TokenizerError(f"{path} line {number}: a merge is two tokens with a space between, not {line[:60]!r}")
        merges.append((pair[0], pair[1]))
    return merges


def _add_declared(backend: tokenizers.Tokenizer, special: SpecialTokens, path: Path) -> None:
    """Add what the side files declare and the tokenizer lacks; free control tokens from text normalization."""
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted: dict[str, AddedToken] = {}
    for token in special.declared:
        if token.id is None and backend.token_to_id(token.content) is None:
            continue  # named in a role, in no vocabulary: inventing an id would point past the embedding
        flags = token if token.flags_known else present.get(token.content, token)
        wanted[token.content] = _added(token.content, flags, special=flags.special or token.special)
    for token in present.values():
        wanted.setdefault(token.content, _added(token.content, token, special=token.special))
    changed = [token for content, token in wanted.items() if not _same(token, present.get(content))]
    backend.add_tokens(changed)  # in the order of the declared ids, which is how new ones get theirs
    for token in special.declared:
        index = backend.token_to_id(token.content)
        if token.id is not None and index != token.id:
            raise TokenizerError(
                f"{path}: token {token.content!r} is declared with id {token.id} but has {index}",
                hint="vocabulary and tokenizer_config.json do not belong together; download both again",
            )
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < MAX_ID:
        raise TokenizerError(f"{path}: the largest token id is {largest}; 0 to {MAX_ID - 1} are plausible")


def _added(content: str, flags: Any, *, special: bool) -> AddedToken:
    # A normalizer that prepends a space mark would hide a normalized "<s>" wherever no space stands before it.
    return AddedToken(
        content,
        lstrip=flags.lstrip,
        rstrip=flags.rstrip,
        single_word=flags.single_word,
        normalized=flags.normalized and not special,
        special=special,
    )


def _same(token: AddedToken, other: AddedToken | None) -> bool:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return other is not None and all(getattr(token, name) == getattr(other, name) for name in names)
