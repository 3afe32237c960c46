"""Which text is measured: found, downloaded and checked; never the network itself."""

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from eval_texts import PARQUET, RAW, ROWS, SHARD, Answer, both, isolate, opener_of, options, put, put_rows, shard

from eval import corpora
from eval.corpora import C4_RECORDS, CORPORA, cache_folder, find, hub_folder
from eval.data import chosen_data, from_files
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import DataError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """See `isolate`."""
    isolate(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")


# --- WikiText-2: where it is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA["wikitext2"].folder)
def test_a_folder_of_data_is_looked_at_first(name: str, home: Path) -> None:
    path = home / "mine" / name
    put_rows(path, ROWS) if name.endswith(".parquet") else put(path, RAW)
    text = chosen_data(options("--data-dir", str(home / "mine")), QuietReporter())
    assert text.name == "wikitext2" and text.paths == (path,) and text.sha256 == corpora.WIKITEXT2_SHA256
    assert both(text) == ("\n\n".join(ROWS), RAW)
    assert both(text) == ("\n\n".join(ROWS), RAW), "a second time"


@pytest.mark.parametrize("repository", ["Salesforce--wikitext", "wikitext"])
@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_then_the_cache_of_hugging_face(
    variable: str, repository: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(home / "there"))
    hub = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    path = put_rows(home / "there" / hub / f"datasets--{repository}" / "snapshots" / "b08601e" / PARQUET, ROWS)
    (home / "empty").mkdir()
    text = chosen_data(options("--data", "wikitext2", "--data-dir", str(home / "empty")), QuietReporter())
    assert text.paths == (path,) and both(text) == ("\n\n".join(ROWS), RAW)


def test_the_home_folder_counts_where_nothing_is_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert hub_folder() == home / ".cache" / "huggingface" / "hub"
        assert cache_folder() == home / ".cache" / "exl-runtime" / "data"


@pytest.mark.parametrize("rows", [None, ["something", "else"], [*ROWS[:-1], " \n "]])
def test_another_text_in_the_named_folder_is_refused(rows: list[str] | None, home: Path) -> None:
    path = put(home / "wiki.test.raw", RAW + "x") if rows is None else put_rows(home / "wikitext-test.parquet", rows)
    with pytest.raises(DataError) as caught:
        chosen_data(options("--data-dir", str(home)), QuietReporter())
    assert caught.value.problem.startswith(f"{path}: not the test split of WikiText-2: SHA-256 ")
    assert "\n" not in caught.value.problem and "--data FILE" in (caught.value.hint or "")


def test_a_damaged_file_in_a_cache_is_passed_over_with_a_warning(home: Path) -> None:
    hub = home / "cache" / "huggingface" / "hub" / "datasets--wikitext" / "snapshots" / "a"
    put(hub / PARQUET, b"PAR1 and no more")
    put(cache_folder() / "wikitext2.test.raw", RAW)
    reporter = QuietReporter()
    assert both(chosen_data(options(), reporter))[1] == RAW
    assert len(reporter.warned) == 1 and "not a readable parquet file" in reporter.warned[0]


def test_offline_and_absent_names_the_two_ways_out() -> None:
    with pytest.raises(DataError) as caught:
        chosen_data(options(), QuietReporter())
    assert "wikitext2 is neither on this machine nor to be downloaded" in caught.value.problem
    assert "HF_HUB_OFFLINE is set" in caught.value.problem and "\n" not in caught.value.problem
    hint = caught.value.hint or ""
    assert "https://" in hint and "wiki.test.raw" in hint and "--data-dir" in hint and "--data FILE" in hint


def test_the_real_file_and_the_published_sizes(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set's card says 4358 rows; 1305088 bytes with 4 for the offset of each."""
    monkeypatch.undo()
    text = corpora.open_wikitext2(shared / "data" / "wikitext2.test.raw")
    assert hashlib.sha256("".join(text.texts(raw=True)).encode()).hexdigest() == text.sha256
    joined = "".join(text.texts()).encode()
    assert len(joined) == 1305088 - 4 * 4358 + 2 * 4357


# --- C4 ---------------------------------------------------------------------------------------------------------------


def test_c4_is_the_first_records_joined_by_spaces(home: Path) -> None:
    path = put(home / "mine" / "en" / SHARD, shard(C4_RECORDS + 50))
    text = chosen_data(options("--data", "c4", "--data-dir", str(home / "mine")), QuietReporter())
    expected = " ".join(f"Record {n}.\nIts end." for n in range(1100))
    assert both(text) == (expected, expected)
    assert text.most_windows == 256 and text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "first 1100 validation records joined by spaces" in text.describe()


def test_c4_from_the_cache_of_hugging_face_unpacked_and_downloaded(home: Path, online: None) -> None:
    hub = home / "cache" / "huggingface" / "hub" / "datasets--allenai--c4" / "snapshots" / "1588ec4"
    path = put(hub / "en" / SHARD, shard(3))
    assert find(CORPORA["c4"], None, QuietReporter()).paths == (path,)
    plain = put(home / "mine" / SHARD.removesuffix(".gz"), gzip.decompress(shard(3)))
    text = find(CORPORA["c4"], home / "mine", QuietReporter())
    assert text.paths == (plain,) and both(text)[0].count("Record") == 3
    path.unlink()
    two = shard(2) + shard(1)  # two members, one file
    text = find(CORPORA["c4"], None, QuietReporter(), opener=opener_of(lambda url: Answer(two)))
    assert text.paths == (cache_folder() / SHARD,) and both(text)[0].count("Record") == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (shard(9)[:-12], "damaged behind line"),
        (gzip.compress(b'{"text": "a"}\nno json\n'), "damaged behind line 2"),
        (gzip.compress(b'{"text": "a"}\n{"no": 1}\n'), "line 2: no .text."),
        (b"plain", "damaged behind line 0"),
    ],
    ids=["cut", "no json", "no text", "no gzip"],
)
def test_a_damaged_c4_is_one_line_while_reading(body: bytes, reason: str, home: Path) -> None:
    put(home / SHARD, body)
    text = find(CORPORA["c4"], home, QuietReporter())
    with pytest.raises(DataError, match=reason) as caught:
        list(text.texts())
    assert "\n" not in caught.value.problem and str(home / SHARD) in caught.value.problem


# --- own files --------------------------------------------------------------------------------------------------------


def test_own_files_of_every_kind_are_one_text(home: Path) -> None:
    paths = [
        put(home / "a.txt", "one\n"),
        put(home / "b.jsonl", '{"text": "two"}\n{"text": "three"}\n'),
        put(home / "c.json", '["four"]'),
        put_rows(home / "d.parquet", ["five", "six"]),
    ]
    text = chosen_data(options("--data", *map(str, paths)), QuietReporter())
    expected = "one\n\n\ntwo\n\nthree\n\nfour\n\nfive\n\nsix"
    assert both(text) == (expected, expected)
    assert text.name == "a.txt, b.jsonl, c.json, d.parquet" and text.paths == tuple(paths)
    assert text.sha256 == hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    assert "files joined by blank lines" in text.describe()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "the file is empty"),
        ("blank.txt", b" \n \n", "holds no text"),
        ("bad.txt", b"ok \xff\xfe", "not UTF-8 text at byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ("bad.json", b'["a", ', "not valid JSON"),
        ("bad.parquet", b"PAR1 nothing", "not a readable parquet file"),
        ("packed.jsonl.gz", gzip.compress(b"x"), "compressed"),
    ],
)
def test_a_malformed_file_is_one_line(name: str, content: bytes, reason: str, home: Path) -> None:
    path = put(home / name, content)
    with pytest.raises(DataError, match=reason) as caught:
        list(chosen_data(options("--data", str(path)), QuietReporter()).texts())
    assert caught.value.problem.startswith(f"{path}: ") and "\n" not in caught.value.problem


def test_what_is_not_there_is_one_line(home: Path) -> None:
    with pytest.raises(DataError, match=r"wikitext3: no such file"):
        chosen_data(options("--data", "wikitext3"), QuietReporter())
    with pytest.raises(DataError, match="wikitext2 stands alone") as caught:
        chosen_data(options("--data", "a.txt", "wikitext2"), QuietReporter())
    assert "./wikitext2" in (caught.value.hint or "")
    with pytest.raises(DataError, match=r"--data-dir .*nowhere: no such folder"):
        chosen_data(options("--data-dir", str(home / "nowhere")), QuietReporter())
    with pytest.raises(DataError, match="no file with text given"):
        from_files([])


def test_reading_needs_no_more_memory_for_more_text(home: Path) -> None:
    def peak(name: str, kind: str, megabytes: int) -> int:
        path = home / f"{name}.{kind}"
        line = "a long line of text " * 50
        with open(path, "w") as file:
            for _ in range(megabytes * 1000):
                file.write(json.dumps({"text": line}) + "\n" if kind == "jsonl" else line + "\n")
        tracemalloc.start()
        try:
            for _ in from_files([path]).texts():
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    for kind in ("txt", "jsonl"):
        peak("warm", kind, 1)
        assert peak("large", kind, 12) < 1.5 * peak("small", kind, 3)


def test_rows_of_wikitext_are_streamed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(home / "wiki.test.raw", RAW * 2000)
    monkeypatch.setattr(corpora, "WIKITEXT2_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    text = find(CORPORA["wikitext2"], home, QuietReporter())
    expected = len("\n\n".join(ROWS * 2000))
    pieces: Iterator[str] = text.texts()
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in pieces) == expected
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
