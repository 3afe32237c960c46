"""Small texts in the shape of the published ones, and an opener that stands for the network."""

import argparse
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from eval import corpora, data
from eval.data import add_data
from exl_runtime.console.program import StrictParser

# The shape of the real file: blank lines hold a space, lines begin with one.
RAW = " \n = Title = \n \n First line . \n Second line é . \n \n = = Part = = \n \n Last . \n \n"
ROWS = [
    "",
    " = Title = \n",
    "",
    " First line . \n",
    " Second line é . \n",
    "",
    " = = Part = = \n",
    "",
    " Last . \n",
    "",
]
PARQUET = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
SHARD = "c4-validation.00000-of-00008.json.gz"


def isolate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches below `folder`, nothing in them, the network switched off; `RAW` stands for WikiText-2."""
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(corpora, "WIKITEXT2_SHA256", hashlib.sha256(RAW.encode()).hexdigest())


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_rows(path: Path, rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"text": rows}), path)
    return path


def options(*arguments: str) -> argparse.Namespace:
    parser = StrictParser()
    add_data(parser)
    return parser.parse_args(arguments)


def both(text: data.TextData) -> tuple[str, str]:
    """(rows joined, raw)"""
    return "".join(text.texts()), "".join(text.texts(raw=True))


def archive(content: str | bytes = RAW, name: str = "wikitext-2-raw/wiki.test.raw") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("wikitext-2-raw/", "")
        made.writestr(name, content)
    return file.getvalue()


class Answer(io.BytesIO):
    """What an opener gives. `promised`: the Content-Length."""

    def __init__(self, body: bytes, promised: int | None = None) -> None:
        super().__init__(body)
        self.headers = {"Content-Length": str(len(body) if promised is None else promised)}


def opener_of(make: Callable[[str], Any]) -> Callable[..., Any]:
    def opener(request: Any, timeout: float) -> Any:
        assert timeout > 0
        given = make(request.full_url)
        if isinstance(given, BaseException):
            raise given
        return given

    return opener


def shard(records: int) -> bytes:
    lines = (json.dumps({"text": f"Record {n}.\nIts end.", "url": "http://x"}) + "\n" for n in range(records))
    return gzip.compress("".join(lines).encode(), mtime=0)
