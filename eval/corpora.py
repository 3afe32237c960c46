"""WikiText-2 and C4: where they may lie on this machine, where they come from, and what their rows are.

wikitext2   the test split of wikitext-2-raw-v1 (Merity et al. 2016), the text most perplexities are of. Its publisher's
            file wiki.test.raw has the SHA-256 below, and whatever is used must give exactly that text. The data set on
            Hugging Face holds a row per line, its line end included, and "" for the lines that are blank (" \\n"): both
            forms can be made from either file.
c4          the first validation shard of allenai/c4, of which the text of the first 1100 records, joined by spaces, is
            used, and at most 256 windows of it: get_c4_new in datautils.py of the GPTQ repository, which most papers
            since report. No hash of the shard is known here: the address names its revision, the checksum inside the
            gzip file is verified after the download, and the SHA-256 of the file used stands in the protocol line.
"""

import gzip
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from exl_runtime.console.progress import Progress
from exl_runtime.errors import DataError
from exl_runtime.files import cache_home, naming, write_pieces
from exl_runtime.texts.records import MAX_RECORD, parquet_texts, record_text

from .data import BLANK_LINE, TextData, digest, file_bytes
from .download import Opener, fetch

WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
C4_RECORDS, C4_WINDOWS = 1100, 256
_BLANK = " \n"
_C4 = "c4-validation.00000-of-00008.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """One text that many numbers are of.

    folder   its usual names in a folder of data                hub    patterns below a Hugging Face hub cache
    urls     in the order they are tried                        limit  bytes that a download may have
    stored   its name in our own cache folder                   fetched(pieces) what is stored of a download, checked
    then     what a person does with a download                 opened(path) checks the file, raises DataError
    """

    name: str
    folder: tuple[str, ...]
    hub: tuple[str, ...]
    urls: tuple[str, ...]
    limit: int
    stored: str
    then: str
    fetched: Callable[[Iterator[bytes]], Iterator[bytes]]
    opened: Callable[[Path], TextData]


def find(corpus: Corpus, folder: Path | None, progress: Progress, *, opener: Opener | None = None) -> TextData:
    """`corpus` from `folder`, else the Hugging Face cache, else our own cache, else from the network.

    A damaged or different file in `folder`, which the user named, is an error. One in a cache is passed over with a
    warning. Raises DataError with the ways out when there is none; StorageError when a download cannot be kept.
    """
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"--data-dir {folder}: no such folder", hint="check the path")
        for name in corpus.folder:
            if (path := folder / name).is_file():
                return corpus.opened(path)
    ours = cache_folder() / corpus.stored
    for path in (*_in_hub(corpus), ours):
        if path.is_file():
            try:
                return corpus.opened(path)
            except DataError as err:
                progress.warn(f"{err.problem}; looking elsewhere")
    reasons = []
    for url in corpus.urls:
        pieces = fetch(url, corpus.name, progress, limit=corpus.limit, opener=opener)
        try:
            with naming(ours.parent):
                ours.parent.mkdir(parents=True, exist_ok=True)
            write_pieces(ours, corpus.fetched(pieces))
            return corpus.opened(ours)
        except DataError as err:
            reasons.append(err.problem)
    raise DataError(
        f"{corpus.name} is neither on this machine nor to be downloaded ({'; '.join(reasons)})",
        hint=f"download {corpus.urls[0]} by hand{corpus.then} and give its folder with --data-dir, or measure a text "
        "of your own with --data FILE",
    )


def cache_folder() -> Path:
    """The folder for what can be downloaded again, by the XDG base directory specification."""
    return cache_home() / "exl-runtime" / "data"


def hub_folder() -> Path:
    """The cache of huggingface_hub, by its own rules: HF_HUB_CACHE, else HF_HOME/hub, else below the user's cache."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else cache_home() / "huggingface") / "hub"


def _in_hub(corpus: Corpus) -> list[Path]:
    return [path for pattern in corpus.hub for path in sorted(hub_folder().glob(pattern))]


def _joined(rows: Iterable[str], joining: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield joining + row if number else row


# --- WikiText-2 -------------------------------------------------------------------------------------------------------


def open_wikitext2(path: Path) -> TextData:
    """WikiText-2's test split in the publisher's raw file, or in a parquet file of the data set. Raises DataError."""

    def rows() -> Iterator[str]:
        if path.suffix == ".parquet":
            yield from parquet_texts(path)
            return
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield "" if line == _BLANK else line

    def read(raw: bool) -> Iterator[str]:
        return (row or _BLANK for row in rows()) if raw else _joined(rows(), BLANK_LINE)

    if path.suffix == ".parquet":
        found = digest(text.encode() for text in read(True))
    else:
        found = digest(file_bytes(path))
    if found != WIKITEXT2_SHA256:
        raise DataError(
            f"{path}: not the test split of WikiText-2: SHA-256 {found}, wanted {WIKITEXT2_SHA256}",
            hint="get wiki.test.raw of wikitext-2-raw-v1, or measure this file as your own text: --data FILE",
        )
    return TextData(
        name="wikitext2",
        paths=(path,),
        sha256=found,
        read=read,
        joined='rows joined by "\\n\\n"',
        raw="the raw file",
    )


def _unzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """wiki.test.raw out of the publisher's archive, once its hash is right."""
    try:
        with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
            name = next(name for name in archive.namelist() if name.endswith("wiki.test.raw"))
            with archive.open(name) as file:
                content = file.read(2**24)
    except (zipfile.BadZipFile, StopIteration, zlib.error, EOFError, NotImplementedError, RuntimeError) as err:
        raise DataError("what came is not an archive with wiki.test.raw") from err
    if (found := hashlib.sha256(content).hexdigest()) != WIKITEXT2_SHA256:
        raise DataError(f"what came is not the test split of WikiText-2: SHA-256 {found}")
    yield content


# --- C4 ---------------------------------------------------------------------------------------------------------------


def open_c4(path: Path) -> TextData:
    """The validation shard, compressed or not. Raises DataError, here or while reading."""

    def records() -> Iterator[str]:
        opened = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with opened(path, "rb") as file:
                while line := file.readline(MAX_RECORD + 1):
                    number += 1
                    yield record_text(json.loads(line), f"{path}: line {number}")
        except (OSError, EOFError, zlib.error, ValueError, RecursionError) as err:  # BadGzipFile is an OSError
            reason = " ".join(str(err).split())[:120]
            raise DataError(f"{path}: damaged behind line {number}: {reason}", hint="download it again") from err

    return TextData(
        name="c4",
        paths=(path,),
        sha256=digest(file_bytes(path)),
        read=lambda raw: _joined(islice(records(), C4_RECORDS), " "),
        joined=f"the first {C4_RECORDS} validation records joined by spaces",
        raw=f"the first {C4_RECORDS} validation records joined by spaces",
        most_windows=C4_WINDOWS,
    )


def _whole_gzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces as they are; DataError unless they are one whole gzip file, whose own checksum holds."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        for piece in pieces:
            rest = piece
            while rest:
                if unpacker.eof:  # several members, one behind another, are one file too
                    unpacker = zlib.decompressobj(wbits=31)
                unpacker.decompress(rest)
                rest = unpacker.unused_data
            yield piece
    except zlib.error as err:
        raise DataError(f"what came is not a whole gzip file: {err}") from err
    if not unpacker.eof:
        raise DataError("what came is not a whole gzip file: its end is missing")


CORPORA = {
    "wikitext2": Corpus(
        name="wikitext2",
        folder=(
            "wikitext2.test.raw",
            "wiki.test.raw",
            "wikitext-2-raw/wiki.test.raw",
            "wikitext-2-raw-v1/wiki.test.raw",
            "wikitext-2-raw-v1/test-00000-of-00001.parquet",
            "test-00000-of-00001.parquet",
            "wikitext-test.parquet",
        ),
        hub=tuple(
            f"datasets--{name}/snapshots/*/wikitext-2-raw-v1/{file}"
            for name in ("Salesforce--wikitext", "wikitext")
            for file in ("test-*.parquet", "wikitext-test.parquet", "test/*.parquet")
        ),
        urls=(
            "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
            "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
        ),
        limit=2**25,
        stored="wikitext2.test.raw",
        then=", unpack wiki.test.raw",
        fetched=_unzipped,
        opened=open_wikitext2,
    ),
    "c4": Corpus(
        name="c4",
        folder=(f"{_C4}.gz", f"en/{_C4}.gz", _C4, f"en/{_C4}"),
        hub=(f"datasets--allenai--c4/snapshots/*/en/{_C4}.gz",),
        urls=(
            f"https://huggingface.co/datasets/allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/{_C4}.gz",
        ),
        limit=2**27,
        stored=f"{_C4}.gz",
        then="",
        fetched=_whole_gzip,
        opened=open_c4,
    ),
}
