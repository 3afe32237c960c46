"""Incremental decoding equals decoding at once, for every decoder and every sequence of ids."""

import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.tokenizer.decoding import CleanUp
from exl_runtime.tokenizer.special import SpecialTokens
from exl_runtime.tokenizer.tokenizer import Tokenizer

MARK = "\u2581"
PIECES = [
    "<s>",
    "</s>",
    "a",
    "b",
    f"{MARK}the",
    MARK,
    f"{MARK}{MARK}",
    f"x{MARK}y",
    "\u00e9",
    "<0x0A>",
    "<0x+1>",
    "<0xé>",
]
PIECES += [
    "<0xE2>",
    "<0x82>",
    "<0xAC>",
    "<0xF0>",
    "<0x9F>",
    "<0x8E>",
    "<0x89>",
    "<0x41>",
    "<0xff>",
    " .",
    " n't",
    " '",
    "",
]
BYTES = [
    "<s>",
    "</s>",
    "a",
    "\u0120the",
    "\u00e2",
    "\u0124",
    "\u00ac",
    "\u00f0",
    "\u0141",
    "\u0130",
    "\u012b",
    "\u00ff",
]
BYTES += ["\u010a", "not mapped", "\u65e5", "\u00e9"]

REPLACE = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
FALLBACK, FUSE, STRIP = (
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)
DECODERS = {
    "bytes": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "sentencepiece": {"type": "Sequence", "decoders": [REPLACE, FALLBACK, FUSE, STRIP]},
    "no strip": {"type": "Sequence", "decoders": [REPLACE, FALLBACK, FUSE]},
    "strip each": {"type": "Sequence", "decoders": [REPLACE, STRIP, FALLBACK, FUSE]},
    "metaspace": {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "split": True},
    "metaspace never": {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "never", "split": True},
    "fallback then metaspace": {
        "type": "Sequence",
        "decoders": [FALLBACK, {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first", "split": True}],
    },
    "none": None,
    "held": {"type": "WordPiece", "prefix": "##", "cleanup": True},
}


def make(decoder: dict | None, pieces: list[str], *, kind: str = "BPE", clean_up: bool = False) -> Tokenizer:
    """A tokenizer whose ids are the places in `pieces`; the first two are special."""
    model = {"type": "BPE", "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": []}
    if kind == "Unigram":
        model = {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -1.0] for piece in pieces]}
    added = [
        {"id": index, "content": pieces[index], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index in (0, 1)
    ]
    text = json.dumps({"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model})
    special = SpecialTokens(clean_up_spaces=clean_up)
    return Tokenizer(tokenizers.Tokenizer.from_str(text), special, where="test")


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    stream = tokenizer.detokenizer(skip)
    return "".join([stream.push(index) for index in ids]) + stream.finish()


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 26), max_size=14), skip=st.booleans())
def test_equals_decoding_at_once(name: str, ids: list[int], skip: bool) -> None:
    tokenizer = make(DECODERS[name], BYTES if name == "bytes" else PIECES)
    assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special=skip)


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 2050), max_size=30), skip=st.booleans())
def test_demo_equals_decoding_at_once(ids: list[int], skip: bool) -> None:
    folder = Path(__file__).resolve().parents[2] / "exl_runtime" / "demo"
    tokenizer = _cached(folder)
    assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special=skip)


_OPEN: dict[Path, Tokenizer] = {}


def _cached(folder: Path) -> Tokenizer:
    if folder not in _OPEN:
        _OPEN[folder] = Tokenizer.open(folder)
    return _OPEN[folder]


@pytest.mark.parametrize("name", ["llama2", "phi-3", "smollm2", "qwen2.5"])
def test_public_tokenizers(shared: Path, name: str) -> None:
    tokenizer = _cached(shared / "tokenizers" / name)

    @settings(max_examples=40, deadline=None)
    @given(
        ids=st.lists(st.one_of(st.integers(0, 300), st.integers(0, tokenizer.vocab_size)), max_size=24),
        skip=st.booleans(),
    )
    def check(ids: list[int], skip: bool) -> None:
        assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special=skip)

    check()


@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
def test_text_in_pieces(name: str) -> None:
    tokenizer = make(DECODERS[name], BYTES if name == "bytes" else PIECES)
    stream = tokenizer.detokenizer()
    euro = [11, 12, 13] if name == "sentencepiece" else [4, 5, 6]
    if name == "sentencepiece":
        euro = [12, 13, 14]
    shown = [stream.push(index) for index in euro]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) + stream.push(2) + stream.finish() == "\u20aca"


def test_first_space_is_dropped_once_and_never_within() -> None:
    tokenizer = make(DECODERS["sentencepiece"], PIECES)
    stream = tokenizer.detokenizer()
    assert [stream.push(0), stream.push(4), stream.push(4)] == ["", "the", " the"]


def test_unfinished_character_at_the_end() -> None:
    stream = make(DECODERS["bytes"], BYTES).detokenizer()
    assert stream.push(4) == "" and stream.push(5) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_shown_or_not() -> None:
    tokenizer = make(DECODERS["bytes"], BYTES)
    assert streamed(tokenizer, [0, 2, 1]) == "a"
    assert streamed(tokenizer, [0, 2, 1], skip=False) == "<s>a</s>"


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([" ", ".", "'", "n't", "s", "  ", "ab", "abcd", " ' ", ",", "?", "'re"]), max_size=20
    )
)
def test_clean_up_stream_equals_clean_up_at_once(pieces: list[str]) -> None:
    stage = CleanUp()
    out = "".join("".join(stage.push([piece])) for piece in pieces) + "".join(stage.finish())
    assert out == CleanUp.whole("".join(pieces))


def test_clean_up_only_where_it_is_harmless() -> None:
    """As in transformers: models of byte pairs mean their spaces."""
    ids = [2, 21, 22]
    for kind, expected in (("BPE", "a . n't"), ("Unigram", "a.n't")):
        tokenizer = make(DECODERS["no strip"], PIECES, kind=kind, clean_up=True)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == expected


def test_linear_time() -> None:
    """Ten times the tokens, about ten times the time: no decoding of the past again."""
    tokenizer = make(DECODERS["sentencepiece"], PIECES)
    seconds = []
    for count in (3_000, 30_000):
        started = time.perf_counter()
        streamed(tokenizer, [2, 4] * (count // 2))
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < 40 * seconds[0] + 0.2
