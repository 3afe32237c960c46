"""The decoders of tokenizer.json as streams: token strings in, text out as soon as no later token can change it.

Each stage does to a stream what the tokenizers library's decoder of the same name does to a whole list, so the
concatenation of a stage's outputs equals the library's result exactly. A decoder without a stage here is not
streamed (`stages_for` returns None). Knows no ids and no special tokens.
"""

import codecs
import re
from collections.abc import Callable
from typing import Any, Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # the "+" form is how Rust reads numbers


class Stage(Protocol):
    """A step of decoding; `finish` is called once, after the last token."""

    def push(self, pieces: list[str]) -> list[str]: ...

    def finish(self) -> list[str]: ...


class _PerPiece:
    """A step that treats every token alone."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def push(self, pieces: list[str]) -> list[str]:
        return [self._change(piece) for piece in pieces]

    def finish(self) -> list[str]:
        return []


class _ByteFallback:
    """Runs of tokens like <0xE2> become the text of their bytes, or one U+FFFD per byte if that is not UTF-8.

    The whole run stands or falls together, so nothing of it can be shown before it ends.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            if match := _BYTE_TOKEN.fullmatch(piece):
                self._run.append(int(match[1], 16))
            else:
                out += self.finish()
                out.append(piece)
        return out

    def finish(self) -> list[str]:
        if not self._run:
            return []
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _ByteLevel:
    """Every character of a token stands for a byte; a token with any other character stands for its own UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, pieces: list[str]) -> list[str]:
        return [self._decoder.decode(token_bytes(piece)) for piece in pieces]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class _StripStart:
    """Drops up to `count` leading characters `content` of the whole text."""

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._left = count

    def push(self, pieces: list[str]) -> list[str]:
        out = []
        for piece in pieces:
            while self._left and piece:
                if piece[0] != self._content:
                    self._left = 0
                    break
                piece = piece[1:]
                self._left -= 1
            out.append(piece)
        return out

    def finish(self) -> list[str]:
        return []


class _Metaspace:
    """The mark becomes a space; in the first token it vanishes when the encoder had put it there."""

    def __init__(self, mark: str, drops_first: bool) -> None:
        self._mark = mark
        self._first = drops_first

    def push(self, pieces: list[str]) -> list[str]:
        out = []
        for piece in pieces:
            out.append(piece.replace(self._mark, "" if self._first else " "))
            self._first = False
        return out

    def finish(self) -> list[str]:
        return []


class _SpaceBetween:
    """No decoder at all: tokens with a space between."""

    def __init__(self) -> None:
        self._first = True

    def push(self, pieces: list[str]) -> list[str]:
        out = []
        for piece in pieces:
            out.append(piece if self._first else " " + piece)
            self._first = False
        return out

    def finish(self) -> list[str]:
        return []


class CleanUp:
    """The old English clean-up of spaces before punctuation, on a stream.

    Every rule removes spaces and reaches at most three characters past one, so the text up to a place that
    has four other characters before it cannot be changed by what follows.
    """

    RULES = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"))
    RULES += ((" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))

    def __init__(self) -> None:
        self._held = ""

    @classmethod
    def whole(cls, text: str) -> str:
        for old, new in cls.RULES:
            text = text.replace(old, new)
        return text

    def push(self, pieces: list[str]) -> list[str]:
        self._held += "".join(pieces)
        cut = len(self._held)
        while cut >= 4 and " " in self._held[cut - 4 : cut]:
            cut -= 1
        if cut < 4:
            return []
        ready, self._held = self._held[:cut], self._held[cut:]
        return [self.whole(ready)]

    def finish(self) -> list[str]:
        text, self._held = self.whole(self._held), ""
        return [text]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's mapping of the 256 bytes to printable characters: printable Latin-1 to itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(rest)})
    return table


_ALPHABET = _byte_alphabet()


def token_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def stages_for(decoder: dict[str, Any] | None) -> Callable[[], list[Stage]] | None:
    """A maker of fresh stages for the `decoder` object of a tokenizer.json; None when it cannot be streamed."""
    if decoder is None:
        return lambda: [_SpaceBetween()]
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(steps, list):
        return None
    makers: list[Callable[[], Stage]] = []
    fused = False  # from here on there is one text, no tokens
    for step in steps:
        maker = _text_step(step) if fused else _token_step(step)
        if maker is None:
            return None
        makers.append(maker)
        fused = fused or step["type"] in ("Fuse", "ByteLevel")
    return lambda: [maker() for maker in makers]


def _token_step(step: dict[str, Any]) -> Callable[[], Stage] | None:
    kind = step.get("type")
    if kind == "ByteLevel":
        return _ByteLevel
    if kind == "ByteFallback":
        return _ByteFallback
    if kind == "Fuse":
        return lambda: _PerPiece(str)
    if kind == "Replace" and isinstance(step.get("pattern"), dict) and step["pattern"].get("String"):
        old, new = step["pattern"]["String"], step["content"]
        return lambda: _PerPiece(lambda piece: piece.replace(old, new))
    if kind == "Strip" and step.get("stop") == 0:
        content, count = step["content"], step["start"]
        return lambda: _PerPiece(lambda piece: _StripStart(content, count).push([piece])[0])
    if kind == "Metaspace":
        mark, drops = step["replacement"], step.get("prepend_scheme", "always") != "never"
        return lambda: _Metaspace(mark, drops)
    return None


def _text_step(step: dict[str, Any]) -> Callable[[], Stage] | None:
    if step.get("type") == "Fuse":
        return lambda: _PerPiece(str)
    if step.get("type") == "Strip" and step.get("stop") == 0:
        content, count = step["content"], step["start"]
        return lambda: _StripStart(content, count)
    return None
