"""Text out of files: what is read, in what pieces, and one clear line for everything that cannot be."""

import builtins
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from exl_runtime.errors import DataError
from exl_runtime.texts import documents, records
from exl_runtime.texts.documents import PIECE, read_documents, regroup

PARAGRAPH = "Ein Satz, 一句话, a sentence. " * 20
LONG = "\n\n".join(f"{index}\n{PARAGRAPH}" for index in range(400))  # several pieces
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def table(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path, row_group_size=3)
    return path


# --- plain text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "A.TXT", "wiki.test.raw"])
def test_plain_text_comes_whole_in_bounded_pieces(name: str, tmp_path: Path) -> None:
    pieces = list(read_documents(put(tmp_path / name, LONG)))
    assert "".join(pieces) == LONG
    assert len(pieces) > 3
    assert all(PIECE // 2 <= len(piece) <= PIECE for piece in pieces[:-1])
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


@pytest.mark.parametrize("chunk", [3, 4, 5, 7, 2**20])
def test_characters_and_line_ends_may_lie_across_the_chunks_read(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    path = put(tmp_path / "a.txt", "\ufeffa\r\näöü\r\r\n😀😀\ufeff一\n\r".encode())
    assert "".join(read_documents(path)) == path.read_text(encoding="utf-8-sig")


@pytest.mark.parametrize("chunk", [3, 5, 2**20])
@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"abc\xff", 3),
        (b"\xef\xbb\xbfa\xffb", 4),
        ("äöü".encode()[:-1], 4),
        (b"abcd\xed\xa0\x80", 4),
        (b"abcd\0e\xff", 4),
    ],
)
def test_bad_bytes_are_named_by_offset(
    data: bytes, offset: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    with pytest.raises(DataError, match=rf"a\.txt: not UTF-8 text at byte {offset}: "):
        list(read_documents(put(tmp_path / "a.txt", data)))


def test_a_large_file_needs_little_memory(tmp_path: Path) -> None:
    record = lines({"text": PARAGRAPH})
    for name, content in (("a.txt", PARAGRAPH + "\n"), ("a.jsonl", record), ("a.json", record)):
        path = put(tmp_path / name, content * (2**24 // len(content)))
        tracemalloc.start()
        read = sum(len(text) for text in read_documents(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22 < read


def test_reading_is_lazy(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", LONG.encode() * 9 + b"\xff"),
        ("a.jsonl", b'"a"\n"b"\noops'),
        ("a.json", b'["a", "b", oops'),
    ):
        assert next(read_documents(put(tmp_path / name, content)))  # far from the broken end


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=40), max_size=8), st.integers(2, 12))
def test_regrouping_keeps_the_text(texts: list[str], size: int) -> None:
    pieces = list(regroup(texts, size))
    assert "".join(pieces) == "".join(texts)
    assert all(pieces)
    assert all(len(piece.rstrip("\n")) <= size for piece in pieces)
    assert all(len(piece) >= size // 2 for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaa\n\nbb\ncc dd", "aaaa\n\n"),  # behind a paragraph
        ("aaaa\n\n\n\nbbbbbb", "aaaa\n\n\n\n"),  # with all its line ends
        ("aaaaaa\n\n\n\nbbbb", "aaaaaa\n\n\n\n"),  # even beyond the size
        ("aaa bb\nc ddddd", "aaa bb\n"),  # else behind a line
        ("aaa bbb cccccc", "aaa bbb"),  # else before a space
        ("aaaaaaaaaaaaaa", "aaaaaaaa"),  # else anywhere
        ("a\n\naaaaaaaaaaa", "a\n\naaaaa"),  # a mark in the first half would make many short pieces
    ],
)
def test_where_pieces_end(text: str, first: str) -> None:
    assert next(regroup([text], 8)) == first


# --- records ----------------------------------------------------------------------------------------------------------

RECORDS = [
    {"text": "one"},
    {"content": "two\n", "id": 3},
    {"messages": TURNS},
    "four",
    {"text": "", "a": 1},
    {"text": "5"},
]
TEXTS = ["one", "two\n", "user: hi\n\nassistant: hello", "four", "5"]
FORMS: dict[str, tuple[str, str]] = {
    "lines": ("a.jsonl", lines(*RECORDS)),
    "lines of Windows, with blank ones": ("a.JSONL", "\ufeff\r\n" + lines(*RECORDS).replace("\n", "\r\n\r\n")),
    "no last line end": ("a.ndjson", lines(*RECORDS).rstrip("\n")),
    "a list": ("a.json", json.dumps(RECORDS)),
    "an indented list": ("a.json", "\ufeff " + json.dumps(RECORDS, indent=2) + "\n"),
    "lines in .json": ("a.json", lines(*RECORDS)),
    "one after another": ("a.json", " ".join(json.dumps(record, indent=1) for record in RECORDS)),
}


@pytest.mark.parametrize("chunk", [3, 64, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_records(form: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    found = list(read_documents(put(tmp_path / FORMS[form][0], FORMS[form][1])))
    assert "".join(found) == "\n\n".join(TEXTS)
    assert len(found) == len(TEXTS)


def test_fields_have_an_order_and_null_is_none() -> None:
    assert records.record_text({"messages": TURNS, "content": "c", "text": "t"}, "") == "t"
    assert records.record_text({"messages": TURNS, "content": "c", "text": None}, "") == "c"


def test_messages_with_parts_and_without_words() -> None:
    picture = [{"type": "image"}, {"type": "text", "text": "what is"}, {"type": "text", "text": "this?"}]
    turns = [{"role": "user", "content": picture}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert records.messages_text(turns, "") == "user: what is\nthis?"


# --- parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_takes_the_column_of_text(tmp_path: Path) -> None:
    texts = [f"text {index}" for index in range(200)]
    path = table(tmp_path / "a.parquet", id=["x"] * 200, content=["no"] * 200, text=texts, n=list(range(200)))
    assert "".join(read_documents(path)) == "\n\n".join(texts)
    assert "".join(read_documents(table(path, id=["x"], content=["yes"], messages=[TURNS]))) == "yes"
    assert "".join(read_documents(table(path, id=["x"], messages=[TURNS]))) == TEXTS[2]
    # "text" is no text here, so the rule for files without one holds
    assert "".join(read_documents(table(path, text=[1, 2], other=["a", "b"]))) == "a\n\nb"


def test_parquet_joins_all_columns_of_text(tmp_path: Path) -> None:
    kinds = {
        "question": pa.array(["q1", "q2", "q3", None]),
        "n": [1, 2, 3, 4],
        "kind": pa.array(["k", None, "k", None]).dictionary_encode(),
        "answer": pa.array(["a1", "a2", None, None], pa.large_string()),
    }
    assert "".join(read_documents(table(tmp_path / "a.parquet", **kinds))) == "q1 k a1\n\nq2 a2\n\nq3 k"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        list(read_documents(path))


def parquet_bytes(folder: Path, **columns: Any) -> bytes:
    return table(folder / "good.parquet", **columns).read_bytes()


BROKEN_PARQUET: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "text": (lambda folder: b"no parquet at all, but a text", "not a readable parquet file"),
    "cut off": (lambda folder: parquet_bytes(folder, text=["a"] * 99)[:-20], "not a readable parquet file"),
    "data damaged": (lambda folder: b"PAR1" + b"\x5a" * 40 + parquet_bytes(folder, text=["a"])[44:], "(after row 0)"),
    "no UTF-8": (lambda folder: parquet_bytes(folder, text=["abcd"]).replace(b"abcd", b"ab\xff\xff"), "utf-8"),
    "no text": (
        lambda folder: parquet_bytes(folder, n=[1], list=[[1]]),
        "no column of text; columns seen: 'n', 'list'",
    ),
    "no rows": (lambda folder: parquet_bytes(folder, text=pa.array([], pa.string())), "holds no text"),
    "only null": (lambda folder: parquet_bytes(folder, text=pa.array([None, None], pa.string())), "holds no text"),
    "odd messages": (lambda folder: parquet_bytes(folder, messages=[[1]]), "row 1: a message is an object"),
}


@pytest.mark.parametrize("kind", BROKEN_PARQUET)
def test_broken_parquet(kind: str, tmp_path: Path) -> None:
    make, words = BROKEN_PARQUET[kind]
    expect(put(tmp_path / "a.parquet", make(tmp_path)), words)


# --- refusals ---------------------------------------------------------------------------------------------------------

# kind -> (name, bytes, words of the message)
FILES: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "empty": ("a.txt", "", ("the file is empty",)),
    "empty lines": ("a.jsonl", "\n\n", ("holds no text",)),
    "blank text": ("a.txt", " \n\t\n", ("holds no text",)),
    "only a mark": ("a.txt", b"\xef\xbb\xbf", ("holds no text",)),
    "empty list": ("a.json", "[]", ("holds no text",)),
    "empty texts": ("a.jsonl", lines({"text": ""}, ""), ("holds no text",)),
    "LFS pointer": ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("LFS pointer", "pull")),
    "gzip by name": ("a.jsonl.gz", "text", ("compressed (gz)", "unpack")),
    "zstandard by name": ("a.jsonl.zst", "text", ("compressed (zst)", "unpack")),
    "gzip by content": ("a.txt", b"\x1f\x8b\x08\0", ("compressed (gz)",)),
    "zstandard by content": ("a", b"\x28\xb5\x2f\xfd\0", ("compressed (zst)",)),
    "UTF-16 with a mark": ("a.txt", "text".encode("utf-16"), ("byte 0", "UTF-16")),
    "UTF-16 without": ("a.txt", "text".encode("utf-16-le"), ("byte 1: a zero byte",)),
    "Latin-1": ("a.txt", "na\xefve".encode("latin-1"), ("byte 2", "save it as UTF-8")),
    "binary": ("model.bin", b"GGUF\x03\0\0\0", ("byte 5: a zero byte",)),
    "line no JSON": ("a.jsonl", lines({"text": "a"}) + "{oops}\n", ("line 2", "not valid JSON")),
    "line cut off": ("a.jsonl", lines({"text": "a"})[:-4], ("line 1", "not valid JSON")),
    "list over lines": ("a.jsonl", '[\n{"text": "a"}]', ("line 1", "not valid JSON", ".json file")),
    "line nested": ("a.jsonl", "[" * 100_000, ("line 1", "nested too deeply")),
    "line not UTF-8": ("a.jsonl", lines({"text": "a"}).encode() + b'{"text": "\xff"}', ("line 2", "byte 24")),
    "line after a mark": ("a.jsonl", b'\xef\xbb\xbf{"text": "\xff"}', ("line 1", "byte 13")),
    "no text": (
        "a.jsonl",
        lines({"text": "a"}, {"input": "b", "n": None}),
        ("line 2", "keys seen: 'input', 'n (null)'"),
    ),
    "many keys": ("a.jsonl", lines({f"k{n}": n for n in range(99)}), ("'k11' and 87 more",)),
    "no keys": ("a.jsonl", "{}", ("keys seen: none",)),
    "text is a number": ("a.jsonl", lines({"text": 5}), ("line 1", '"text" must be a text, is 5')),
    "line is a number": ("a.jsonl", "5\n", ("line 1", "not 5")),
    "line is a list": ("a.jsonl", lines(["a", "b"]), ("line 1", "not ['a', 'b']")),
    "messages no list": ("a.jsonl", lines({"messages": "a"}), ("line 1", '"messages" must be a list')),
    "message no object": ("a.jsonl", lines({"messages": ["a"]}), ("line 1", "not 'a'")),
    "message without role": ("a.jsonl", lines({"messages": [{"content": "a"}]}), ("line 1", '"role"')),
    "content a number": ("a.jsonl", lines({"messages": [{"role": "user", "content": 1}]}), ("line 1", "is 1")),
    "list no JSON": ("a.json", '[{"text": "a"}, {"text": oops}]', ("record 2", "not valid JSON")),
    "list cut off": ("a.json", '[{"text": "a"}, {"text": "b', ("record 2", "not valid JSON")),
    "list not closed": ("a.json", '[{"text": "a"}', ("record 1", "the end of the file")),
    "list without commas": ("a.json", '[{"text": "a"} {"text": "b"}]', ("record 1", '"," or "]"')),
    "list with a last comma": ("a.json", '[{"text": "a"},]', ("record 2", "not valid JSON")),
    "more behind the list": ("a.json", '[{"text": "a"}] []', ("more text behind the end",)),
    "object around the list": ("a.json", '{"data": [{"text": "a"}]}', ("record 1", "keys seen: 'data'")),
    "list nested": ("a.json", "[" * 100_000, ("record 1", "nested too deeply")),
    "list not UTF-8": ("a.json", b'[{"text": "\xff"}]', ("byte 11",)),
}


def expect(path: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert str(path) in caught.value.problem
    assert "\n" not in caught.value.problem
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", FILES)
def test_refused_file(kind: str, tmp_path: Path) -> None:
    name, content, words = FILES[kind]
    expect(put(tmp_path / name, content), *words)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        read_documents(tmp_path / "nowhere.txt")  # before anything is asked of the iterator
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    expect(tmp_path / "link.txt", "a link to a file that does not exist")
    expect(tmp_path, "a folder", "name the files in it")
    os.mkfifo(tmp_path / "pipe.txt")
    expect(tmp_path / "pipe.txt", "not a regular file")
    expect(Path(os.devnull), "not a regular file")
    with pytest.raises(DataError, match="not a path"):
        read_documents(Path("a\0b.txt"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_unreadable_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / name, lines({"text": "a"}))
    texts = read_documents(path)
    real = builtins.open

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    expect(path, "cannot be read: Permission denied")
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        list(texts)  # readable when it was checked, no more when it was read


def test_a_record_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD", 1000)
    monkeypatch.setattr(documents, "_CHUNK", 100)
    expect(put(tmp_path / "a.jsonl", lines({"text": "a"}, {"text": "b" * 1000})), "line 2: longer than 1000 bytes")
    expect(put(tmp_path / "a.json", '["' + "b" * 5000), "record 1", "longer than 1000 characters")
    fits = put(tmp_path / "b.json", json.dumps(["b" * 900] * 3))
    assert [len(text) for text in read_documents(fits)] == [902, 902, 900]
