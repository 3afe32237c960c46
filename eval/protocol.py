"""How a text becomes scored windows. The presets do what published numbers were made with, see `PRESETS`.

A perplexity means nothing without its protocol: the same model gives values far apart by context length, by how much
context the scored tokens have, and by whether a start-of-text token (BOS) stands in front.

gptq      windows of 2048 tokens side by side; every token but the first of a window is scored; what does not fill a
          last window is left out. The text is the rows of the data set joined by blank lines, encoded as one text,
          with one BOS in front of all of it where the tokenizer adds one.
          Frantar et al. 2022, GPTQ, section 4 and its repository: datautils.py (get_wikitext2), llama.py (llama_eval).
exl2      windows of 2048 tokens that begin every 512, the first 20 of them; in each one every token but the first is
          scored, so most tokens are scored several times with different context. Text and BOS as in gptq.
          The graphs of exllamav3, which compare EXL2, EXL3 and others: doc/exl3.md, eval/compare_q.py at its first
          commit, with eval/spec/wiki2_llama3.json. Its eval/ppl.py was the same without BOS and with --rows;
          exllamav2's `test_inference.py -sp wiki2` is `stride` here, without BOS and without the last, shorter window.
llamacpp  windows of 512 tokens side by side; BOS, where the tokenizer adds one, replaces the first token of each; the
          tokens behind the middle are scored: 255 of 512 (the middle one is context). The text is the raw file.
          llama.cpp, tools/perplexity/perplexity.cpp (perplexity) with its default context.
stride    windows of 2048 tokens that begin every 512; each scores only what the ones before it did not, so every token
          is scored once, with 1536 tokens of context or more behind the first window; the last window may be shorter.
          Hugging Face, "Perplexity of fixed-length models". Text and BOS as in gptq.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exl_runtime.console.progress import Progress
from exl_runtime.errors import DataError, UsageError

from .data import TextData
from .opening import positive

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime
    from exl_runtime.tokenizer.tokenizer import Tokenizer

Scored = Literal["all", "new", "half"]


@dataclass(frozen=True, slots=True)
class Window:
    """What goes through the model at once. The tokens ids[first:] are scored, each given all ids before it in here.

    1 <= first < len(ids).
    """

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """See the top of this file. Raises UsageError for sizes that make no window.

    length   tokens of a window
    stride   tokens from the start of one window to the start of the next
    rows     at most so many windows; None: all the text
    scored   "all" but the first token of a window; "new": what no window before it scored; "half": behind the middle
    each_bos a BOS that the tokenizer adds also replaces the first token of every window, not only leads the text
    raw      the text as it is in the raw file; else the rows of the data set, joined
    tail     the tokens that do not fill a last window make a shorter one
    """

    name: str
    length: int
    stride: int
    rows: int | None = None
    scored: Scored = "all"
    each_bos: bool = False
    raw: bool = False
    tail: bool = False

    def __post_init__(self) -> None:
        least = 3 if self.scored == "half" else 2
        if self.length < least:
            raise UsageError(f"windows of {self.length} tokens score nothing", hint=f"--length {least} is the least")
        if not 1 <= self.stride <= self.length:
            raise UsageError(
                f"a stride of {self.stride} tokens with windows of {self.length}: some text would never be looked at",
                hint=f"give --stride from 1 to {self.length}",
            )
        if self.rows is not None and self.rows < 1:
            raise UsageError(f"{self.rows} windows score nothing", hint="give --rows from 1 up")

    @property
    def first(self) -> int:
        """`Window.first` of every window but the very first one, where "new" tokens begin at 1."""
        if self.scored == "half":
            return self.length // 2 + 1
        return 1 if self.scored == "all" else max(1, self.length - self.stride)

    def describe(self, data: TextData, tokenizer: "Tokenizer | None" = None) -> str:
        """One line that says how to repeat the number; `tokenizer` settles whether there is a BOS."""
        what = {
            "all": "all tokens of a window but its first are scored",
            "new": f"the {self.length - self.first} new tokens of a window are scored, all but one of the first window",
            "half": f"the last {self.length - self.first} tokens of a window are scored",
        }[self.scored]
        where = "side by side" if self.stride == self.length else f"every {self.stride}"
        most = most_windows(self, data)
        place = "in place of the first token of each window" if self.each_bos else "once, before the text"
        if tokenizer is None:
            bos = f"BOS {place} if the tokenizer adds one"
        else:
            bos = f"BOS {place}" if tokenizer.adds_bos else "no BOS (the tokenizer adds none)"
        parts = (
            f"{self.name}: {data.describe(raw=self.raw)}",
            f"windows of {self.length} tokens {where}, {'all' if most is None else f'the first {most}'}"
            + (" and a shorter last one" if self.tail and most is None else ""),
            what,
            bos,
        )
        return "; ".join(parts)


PRESETS = {
    "gptq": Protocol(name="gptq", length=2048, stride=2048),
    "exl2": Protocol(name="exl2", length=2048, stride=512, rows=20),
    "llamacpp": Protocol(name="llamacpp", length=512, stride=512, scored="half", each_bos=True, raw=True),
    "stride": Protocol(name="stride", length=2048, stride=512, scored="new", tail=True),
}


# --- arguments --------------------------------------------------------------------------------------------------------


def add_protocol(parser: argparse.ArgumentParser, default: str = "gptq") -> None:
    """--protocol, --length, --stride and --rows."""
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        default=default,
        choices=tuple(PRESETS),
        help="gptq: 2048 tokens side by side; exl2: 2048 every 512, 20 windows, all scored; llamacpp: 512, second half "
        f"scored; stride: 2048 every 512, each token scored once (default: {default})",
    )
    group.add_argument("--length", type=positive, metavar="N", help="tokens of a window, instead of the preset's")
    group.add_argument("--stride", type=positive, metavar="N", help="tokens from one window's start to the next one's")
    group.add_argument("--rows", type=positive, metavar="N", help="at most so many windows")


def chosen_protocol(args: argparse.Namespace) -> Protocol:
    """The protocol that the options of `add_protocol` in `args` name. Raises UsageError.

    With --length alone, windows side by side stay so; a stride that is no longer less than the length keeps its share
    of it.
    """
    preset = resized(PRESETS[args.protocol], args.length or PRESETS[args.protocol].length)
    return replace(preset, stride=args.stride or preset.stride, rows=args.rows or preset.rows)


def resized(protocol: Protocol, length: int) -> Protocol:
    """The same with windows of another length. Raises UsageError for a length that makes no window."""
    stride = protocol.stride
    if stride == protocol.length or stride >= length:
        stride = max(1, length * stride // protocol.length)
    return replace(protocol, length=length, stride=stride)


def fitted(protocol: Protocol, model: str | Path, progress: Progress, *, explicit: bool) -> Protocol:
    """`protocol` with windows no longer than the context `model` was made for, and a warning if that is shorter.

    explicit   the user named the length: it stays, the runtime says that it is beyond the model
    Raises ConfigError or UnsupportedModel for a folder that is no model.
    """
    from exl_runtime.config.read import load_config
    from exl_runtime.config.resolve import resolve
    from exl_runtime.runtime.load import find

    files = load_config(find(model))
    limit = resolve(files.config, files.generation).context_length
    if explicit or protocol.length <= limit:
        return protocol
    progress.warn(
        f"{model} was made for {limit} tokens: windows of {limit}, where published numbers of the {protocol.name} "
        f"protocol have {protocol.length}"
    )
    return resized(protocol, limit)


def conditions(runtime: "Runtime", dtype: str = "auto") -> str:
    """How the model ran: the rest of what a number needs to be repeated. dtype: as given to `open_model`."""
    from exl_runtime import __version__

    info = runtime.info
    activations = ("fp32" if info.device == "cpu" else "fp16") if dtype == "auto" else dtype
    return (
        f"cache {info.cache}; activations {activations}; {info.backend} kernels on {info.device}"
        f"{'' if info.accuracy == 'exact' else ', ' + info.accuracy}; "
        f"exl-runtime {__version__}"
    )


# --- windows ----------------------------------------------------------------------------------------------------------


def windows(protocol: Protocol, data: TextData, tokenizer: "Tokenizer") -> Iterator[Window]:
    """The windows of a text, in order. Holds one window and a piece of the text at a time.

    Text that spells out a control token is encoded as ordinary text.
    Raises DataError for a text shorter than one window, and as `TextData.texts`.
    """
    most = most_windows(protocol, data)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    length, stride = protocol.length, protocol.stride
    held: list[int] = []  # tokens from the start of the next window on
    made = 0
    for piece in _ids(protocol, data, tokenizer):
        held += piece
        start = 0
        while len(held) - start >= length:
            if made == most:
                return
            ids = held[start : start + length]
            if protocol.each_bos and bos is not None:
                ids[0] = bos
            yield Window(tuple(ids), 1 if protocol.scored == "new" and not made else protocol.first)
            made += 1
            start += stride
        del held[:start]
    if not made:
        raise _too_short(protocol, data, len(held))
    first = max(1, length - stride)  # what lies before it was scored by the last full window
    if protocol.tail and made != most and len(held) > first:
        yield Window(tuple(held), first)


def count_windows(protocol: Protocol, data: TextData, tokenizer: "Tokenizer") -> int:
    """How many `windows` gives. Reads no more of the text than needed. Raises as `windows`."""
    most = most_windows(protocol, data)
    enough = None if most is None else protocol.length + (most - 1) * protocol.stride
    tokens = 0
    for piece in _ids(protocol, data, tokenizer):
        tokens += len(piece)
        if enough is not None and tokens >= enough:
            return most or 0
    if tokens < protocol.length:
        raise _too_short(protocol, data, tokens)
    full, rest = divmod(tokens - protocol.length, protocol.stride)
    return full + 1 + (protocol.tail and rest > 0 and tokens - (full + 1) * protocol.stride > 1)


def most_windows(protocol: Protocol, data: TextData) -> int | None:
    """The limit on windows: the protocol's, else the one that belongs to the data; None: none."""
    return data.most_windows if protocol.rows is None else protocol.rows


def _ids(protocol: Protocol, data: TextData, tokenizer: "Tokenizer") -> Iterator[list[int]]:
    """The text's ids in pieces, BOS in front where the tokenizer adds one."""
    from exl_runtime.texts.tokens import encoded, plain_encoder

    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        yield [tokenizer.bos_id]
    for piece in encoded(data.texts(raw=protocol.raw), plain_encoder(tokenizer)):
        yield piece.tolist()


def _too_short(protocol: Protocol, data: TextData, tokens: int) -> DataError:
    return DataError(
        f"{data.name}: {tokens} tokens, one window of the {protocol.name} protocol has {protocol.length}",
        hint="give more text, or a smaller --length",
    )
