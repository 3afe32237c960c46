"""Downloads of the known texts: what is kept, and one clear line for everything that fails. No network."""

import http.server
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
from eval_texts import RAW, ROWS, Answer, archive, both, isolate, opener_of, put, shard

from eval import corpora
from eval.corpora import CORPORA, cache_folder, find
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import DataError, StorageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """See `isolate`."""
    isolate(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")


# --- WikiText-2: downloads --------------------------------------------------------------------------------------------


def test_a_download_is_kept_and_not_repeated(online: None) -> None:
    asked: list[str] = []

    def make(url: str) -> Answer:
        asked.append(url)
        return Answer(archive())

    for _ in range(2):
        text = find(CORPORA["wikitext2"], None, QuietReporter(), opener=opener_of(make))
        assert both(text) == ("\n\n".join(ROWS), RAW)
        assert text.paths == (cache_folder() / "wikitext2.test.raw",)
    assert asked == [CORPORA["wikitext2"].urls[0]]
    assert [path.name for path in cache_folder().iterdir()] == ["wikitext2.test.raw"]


def test_the_second_address_helps_when_the_first_does_not(online: None) -> None:
    def make(url: str) -> Any:
        return URLError("no route") if "huggingface" in url else Answer(archive())

    assert both(find(CORPORA["wikitext2"], None, QuietReporter(), opener=opener_of(make)))[1] == RAW


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda url: URLError("Name or service not known"), "Name or service not known"),
        (lambda url: TimeoutError("timed out"), "timed out"),
        (lambda url: HTTPError(url, 404, "Not Found", {}, None), "404 Not Found"),
        (lambda url: Answer(archive()[:50], len(archive())), "the connection ended after 50 of "),
        (lambda url: Answer(b"x", 2**40), "1099511627776 bytes, at most "),
        (lambda url: Answer(b"<html>log in</html>"), "not an archive with wiki.test.raw"),
        (lambda url: Answer(archive(name="other.txt")), "not an archive with wiki.test.raw"),
        (lambda url: Answer(archive(RAW + "x")), "not the test split of WikiText-2: SHA-256 "),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(
    make: Callable[[str], Any], reason: str, online: None
) -> None:
    with pytest.raises(DataError) as caught:
        find(CORPORA["wikitext2"], None, QuietReporter(), opener=opener_of(make))
    assert reason in caught.value.problem and "\n" not in caught.value.problem
    assert "--data-dir" in (caught.value.hint or "")
    assert list(cache_folder().iterdir()) == []


def test_more_bytes_than_expected_are_refused(online: None) -> None:
    opener = opener_of(lambda url: Answer(b"x" * 99, 0))
    pieces = corpora.fetch("https://x/y", "it", QuietReporter(), limit=10, opener=opener)
    with pytest.raises(DataError, match="x: more than the 10 bytes that were expected"):
        list(pieces)


def test_ctrl_c_in_a_download_leaves_nothing(online: None) -> None:
    class Stopped(Answer):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise KeyboardInterrupt
            return super().read(10)

    with pytest.raises(KeyboardInterrupt):
        find(CORPORA["c4"], None, QuietReporter(), opener=opener_of(lambda url: Stopped(shard(3))))
    assert list(cache_folder().iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(online: None, home: Path) -> None:
    put(home / "cache", "a file")
    with pytest.raises(StorageError, match="cannot be written"):
        find(CORPORA["wikitext2"], None, QuietReporter(), opener=opener_of(lambda url: Answer(archive())))


def test_over_a_real_connection(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                self.end_headers()
                return
            body = archive()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + 100 * (self.path == "/short")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            broken = replace(CORPORA["wikitext2"], urls=(f"{base}/short",))
            with pytest.raises(DataError, match="the connection ended after"):
                find(broken, None, QuietReporter())
            text = find(replace(CORPORA["wikitext2"], urls=(f"{base}/moved",)), None, QuietReporter())
        finally:
            server.shutdown()
    assert both(text)[1] == RAW


@pytest.mark.parametrize(
    ("body", "reason"),
    [(shard(9)[:-9], "its end is missing"), (b"<html>", "not a whole gzip file"), (shard(9)[:-6] + b"123456", "check")],
    ids=["cut", "html", "checksum"],
)
def test_a_damaged_download_of_c4_is_refused(body: bytes, reason: str, online: None) -> None:
    with pytest.raises(DataError, match=reason):
        find(CORPORA["c4"], None, QuietReporter(), opener=opener_of(lambda url: Answer(body)))
    assert list(cache_folder().iterdir()) == []
