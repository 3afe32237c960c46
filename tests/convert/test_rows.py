"""Token rows: fair to every file, spread over each, the same text as when encoded at once."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from convert import rows as rows_module
from convert.rows import random_rows, rows_from_files, token_stream
from exl_runtime.errors import ConvertError, DataError
from exl_runtime.texts import tokens
from exl_runtime.texts.documents import PIECE
from exl_runtime.tokenizer.tokenizer import Tokenizer

BOS = 7
PLANE = 0x10000  # file number f is made of the characters PLANE * (f + 1), PLANE * (f + 1) + 1, ...


class Letters:
    """A tokenizer whose ids are code points: a row says which file it is from, and which place."""

    def __init__(self) -> None:
        self.encoded = 0

    def control_texts(self) -> frozenset[str]:
        return frozenset()

    def encode_rendered(self, text: str) -> list[int]:
        self.encoded += len(text)
        return [ord(character) for character in text]


def files(folder: Path, *sizes: int) -> list[Path]:
    paths = []
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}.txt")
        start = PLANE * (number + 1)
        paths[-1].write_text("".join(map(chr, range(start, start + size))), encoding="utf-8")
    return paths


def count_by_file(rows: torch.Tensor) -> list[int]:
    return torch.bincount(rows[:, -1] // PLANE, minlength=2)[1:].tolist()


def is_running(rows: torch.Tensor) -> bool:
    return bool((rows.diff(dim=1) == 1).all())


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos_id", [BOS, None])
def test_shape_and_running_text(bos_id: int | None, tmp_path: Path) -> None:
    rows = rows_from_files(files(tmp_path, 3000, 50_000), Letters(), rows=9, length=40, bos_id=bos_id)
    assert rows.dtype == torch.int64
    assert rows.shape == (9, 40)
    body = rows
    if bos_id is not None:
        assert (rows[:, 0] == BOS).all()
        body = rows[:, 1:]
    assert is_running(body)
    assert len({int(start) for start in body[:, 0]}) == 9
    spans = sorted((int(row[0]), int(row[-1])) for row in body)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans)), "no text twice"


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ((50_000, 50_000), 10, [5, 5]),
        ((50_000, 50_000), 11, [6, 5]),
        ((1000, 50_000), 40, [10, 30]),  # 10 rows of 100 is all the first has
        ((50_000, 250, 1000, 1000), 40, [18, 2, 10, 10]),
        ((900, 60_000, 900), 600, [9, 582, 9]),  # the long one is read again for more than its equal share
        ((1000, 1000), 20, [10, 10]),  # every token there is
        ((65_000,), 650, [650]),
    ],
)
def test_equal_shares_and_the_others_fill_up(
    sizes: tuple[int, ...], count: int, shares: list[int], tmp_path: Path
) -> None:
    rows = rows_from_files(files(tmp_path, *sizes), Letters(), rows=count, length=101, bos_id=BOS)
    assert count_by_file(rows) == shares


def test_the_first_rows_are_a_fair_choice_too(tmp_path: Path) -> None:
    rows = rows_from_files(files(tmp_path, 60_000, 60_000, 60_000), Letters(), rows=30, length=101, bos_id=BOS)
    assert count_by_file(rows[:9]) == [3, 3, 3]
    places = (rows[:, -1] % PLANE)[::3]
    assert not torch.equal(places, places.sort().values)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("size", "count"), [(12_000, 10), (60_000, 10), (60_000, 3), (4000, 20), (65_000, 64)])
def test_rows_are_spread_over_the_whole_file(size: int, count: int, seed: int, tmp_path: Path) -> None:
    rows = rows_from_files(files(tmp_path, size), Letters(), rows=count, length=101, bos_id=BOS, seed=seed)
    places = (rows[:, 1] % PLANE).sort().values
    step = size / count
    gaps = torch.diff(places, prepend=torch.tensor([0]), append=torch.tensor([size]))
    # Spans of a thinned file are at least 4096 characters apart, and one place is as good as another inside one.
    assert gaps.max() <= 2 * step + 4096 * (size > 8192 * count) + 200


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_thinned_file_are_spread_over_all_of_it(seed: int, tmp_path: Path) -> None:
    (path,) = files(tmp_path, 900_000)
    rows = rows_from_files([path], Letters(), rows=10, length=101, bos_id=BOS, seed=seed)
    assert is_running(rows[:, 1:])
    places = (rows[:, 1] - PLANE).sort().values
    gaps = torch.diff(places, prepend=torch.tensor([0]), append=torch.tensor([900_000]))
    assert gaps.max() < 2.5 * 90_000
    assert gaps[1:-1].min() > 90_000 / 2.5


def test_a_long_file_is_not_tokenized_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("0123456789\n" * 200_000)
    tokenizer = Letters()
    rows = rows_from_files([path], tokenizer, rows=4, length=101, bos_id=BOS)
    assert rows.shape == (4, 101)
    assert tokenizer.encoded < 100_000 < path.stat().st_size


class Words(Letters):
    """One id per 500 characters: far fewer tokens than a span was cut for."""

    def encode_rendered(self, text: str) -> list[int]:
        return super().encode_rendered(text[499::500])


def test_long_tokens_are_met_by_reading_more(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("x" * 2_000_000)
    assert rows_from_files([path], Words(), rows=30, length=101, bos_id=BOS).shape == (30, 101)
    with pytest.raises(ConvertError, match=r"too little calibration text: [34]\d\d\d tokens"):
        rows_from_files([path], Words(), rows=41, length=101, bos_id=BOS)


def test_same_arguments_same_rows(tmp_path: Path) -> None:
    paths = files(tmp_path, 60_000, 20_000)

    def rows(seed: int) -> torch.Tensor:
        return rows_from_files(paths, Letters(), rows=12, length=101, bos_id=BOS, seed=seed)

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_files_shorter_than_a_row_are_joined(tmp_path: Path) -> None:
    short = files(tmp_path, 60, 70, 80)
    rows = rows_from_files(short, Letters(), rows=2, length=101, bos_id=BOS)
    assert sorted(rows[:, 1:].flatten().tolist()) == sorted(
        [PLANE + i for i in range(60)] + [2 * PLANE + i for i in range(70)] + [3 * PLANE + i for i in range(70)]
    )
    # Beside a long file they count as one: 2 rows of theirs, the rest from it.
    rows = rows_from_files(files(tmp_path, 60, 70, 80, 50_000), Letters(), rows=10, length=101, bos_id=BOS)
    assert (rows[:, 1] >= 4 * PLANE).sum() == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 12), st.integers(2, 60))
def test_enough_tokens_is_exactly_enough(sizes: list[int], count: int, length: int) -> None:
    texts = ["".join(map(chr, range(PLANE * (n + 1), PLANE * (n + 1) + size))) for n, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "read_documents", lambda path: iter([texts[int(path)]]))
        paths = [str(number) for number in range(len(sizes))]
        wanted = count * (length - 1)
        if sum(sizes) < wanted:
            with pytest.raises(ConvertError, match=f"{sum(sizes)} tokens .*, {wanted} wanted"):
                rows_from_files(paths, Letters(), rows=count, length=length, bos_id=BOS)
        else:
            rows = rows_from_files(paths, Letters(), rows=count, length=length, bos_id=BOS)
            assert rows.shape == (count, length)
            assert len(rows[:, 1:].unique()) == wanted  # no token twice


def test_too_little_text_says_what_to_do(tmp_path: Path) -> None:
    path = files(tmp_path, 1000)
    with pytest.raises(ConvertError) as caught:
        rows_from_files(path, Letters(), rows=11, length=101, bos_id=BOS)
    assert str(path[0]) in caught.value.problem
    assert "1000 tokens" in caught.value.problem
    assert "1100 wanted (11 rows of 100)" in caught.value.problem
    assert "--rows (to 10)" in (caught.value.hint or "")
    with pytest.raises(ConvertError) as caught:
        rows_from_files([*path, *path], Letters(), rows=1, length=9999, bos_id=None)
    assert "2000 tokens in 2 files" in caught.value.problem
    assert "lower --length" in (caught.value.hint or "")


def test_senseless_arguments(tmp_path: Path) -> None:
    path = files(tmp_path, 1000)
    for rows, length, bos_id in ((0, 10, None), (1, 0, None), (1, 1, BOS), (-1, 10, None)):
        with pytest.raises(ConvertError):
            rows_from_files(path, Letters(), rows=rows, length=length, bos_id=bos_id)
    for limit in (0, -1):
        with pytest.raises(ConvertError):
            token_stream(path, Letters(), limit=limit)
    with pytest.raises(ConvertError, match="no file"):
        rows_from_files([], Letters(), rows=1, length=10, bos_id=None)
    with pytest.raises(ConvertError, match="no file"):
        token_stream([], Letters())


def test_broken_files_are_named(tmp_path: Path) -> None:
    good, bad = files(tmp_path, 60_000, 10)
    bad.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"1\.txt: not UTF-8 text at byte 3"):
        rows_from_files([good, bad], Letters(), rows=1, length=10, bos_id=None)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_stream_is_all_files_in_order(tmp_path: Path) -> None:
    paths = files(tmp_path, 1000, 2000)
    stream = token_stream(paths, Letters())
    assert stream.dtype == torch.int64
    assert stream.tolist() == [*range(PLANE, PLANE + 1000), *range(2 * PLANE, 2 * PLANE + 2000)]
    assert torch.equal(token_stream(paths, Letters(), limit=1500), stream[:1500])
    assert torch.equal(token_stream(paths, Letters(), limit=9999), stream)


def test_stream_stops_reading_at_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789\n" * 200_000 + b"\xff")
    tokenizer = Letters()
    assert len(token_stream([path], tokenizer, limit=50)) == 50
    assert tokenizer.encoded <= PIECE + 1


class Spaced(Letters):
    """Like many sentencepiece models: a text begins with a space of the tokenizer's own."""

    def encode_rendered(self, text: str) -> list[int]:
        return [ord("▁"), *super().encode_rendered(text)]


def test_pieces_in_the_middle_of_a_text_do_not_begin_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n" * 40_000)
    stream = token_stream([path], Spaced())
    assert stream[0] == ord("▁")
    assert (stream == ord("▁")).sum() == 1
    assert len(stream) == 1 + path.stat().st_size
    rows = rows_from_files([path], Spaced(), rows=10, length=101, bos_id=None)  # of spans, not of the whole
    assert (rows == ord("▁")).sum() <= 1


# --- real tokenizers against transformers -----------------------------------------------------------------------------

PARAGRAPHS = "".join(
    f"Chapter {n}\nIt was {n} o'clock; das Öl, 一句话. `x = [{n}]`\n    return  None\n\n" for n in range(40)
)


def chunks_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(tokens, "PIECE", size)


def test_tokens_are_those_of_the_whole_text(ember: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PARAGRAPHS, encoding="utf-8")
    check_against_transformers(ember, path, monkeypatch)


@pytest.mark.parametrize("name", ["llama2", "phi-3", "qwen2.5", "smollm2"])
def test_tokens_of_published_tokenizers(
    name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PARAGRAPHS, encoding="utf-8")
    check_against_transformers(shared / "tokenizers" / name, path, monkeypatch)


def check_against_transformers(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, oracle = Tokenizer.open(folder), AutoTokenizer.from_pretrained(folder)
    whole = oracle(PARAGRAPHS, add_special_tokens=False)["input_ids"]
    assert token_stream([path], tokenizer).tolist() == whole
    chunks_of(monkeypatch, 700)  # five joints
    pieced = token_stream([path], tokenizer).tolist()
    assert tokenizer.decode(pieced) == tokenizer.decode(whole)
    # A tokenizer may join line ends differently when it sees what follows: two ids a joint, and nothing else.
    assert abs(len(pieced) - len(whole)) <= 5 * 2
    body = len(pieced) // 4
    rows = rows_from_files([path], tokenizer, rows=4, length=body + 1, bos_id=tokenizer.bos_id or 0)
    found = [tuple(row) for row in rows[:, 1:].tolist()]
    assert sorted(found) == sorted(tuple(pieced[i * body : (i + 1) * body]) for i in range(4))


def test_control_tokens_in_a_text_are_text(ember: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(ember)
    controls = sorted(tokenizer.control_texts())
    assert controls
    path = tmp_path / "a.txt"
    path.write_text(" and ".join(["start", *controls, "end"]))
    ids = token_stream([path], tokenizer).tolist()
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special=False) == path.read_text()


# --- random rows ------------------------------------------------------------------------------------------------------


def ids_of(rows: torch.Tensor) -> Iterable[int]:
    return rows.unique().tolist()


def test_random_rows_are_uniform_without_the_excluded() -> None:
    rows = random_rows(50, 200, 100, seed=3, exclude={0, 7, 49, 1000})
    assert rows.dtype == torch.int64
    assert rows.shape == (200, 100)
    assert ids_of(rows) == [i for i in range(50) if i not in (0, 7, 49)]
    # 20000 draws among 47: a count is 426 +- 20.4, and the largest deviation of 47 stays under 5 sigma
    counts = torch.bincount(rows.flatten(), minlength=50)
    assert (counts[counts > 0] - 20_000 / 47).abs().max() < 5 * 20.4


def test_random_rows_are_repeatable_and_may_begin_with_bos() -> None:
    first = random_rows(50, 4, 9, 1, [BOS], bos_id=BOS)
    assert torch.equal(first, random_rows(50, 4, 9, 1, [BOS], bos_id=BOS))
    assert not torch.equal(first, random_rows(50, 4, 9, 2, [BOS], bos_id=BOS))
    assert (first[:, 0] == BOS).all()
    assert (first[:, 1:] != BOS).all()
    assert random_rows(50, 0, 9, 1, []).shape == (0, 9)


def test_random_rows_need_an_id() -> None:
    with pytest.raises(ConvertError, match="all 3 are excluded"):
        random_rows(3, 1, 1, 0, range(3))
    with pytest.raises(ConvertError):
        random_rows(3, 1, 0, 0, [])
