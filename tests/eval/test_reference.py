"""The reference on disk: small, found again, made anew when anything changed, whole or absent."""

import json
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import eval_models
import numpy as np
import pytest
import torch
from eval_references import options, some_windows, variant
from safetensors.torch import load_file, save_file

import exl_runtime as exl
from eval import identity, opening, reference_file
from eval.logprobs import decode
from eval.protocol import Window
from eval.reference import Reference, cache_folder, open_reference, require_comparable, require_same_tokenizer
from eval.reference_file import Layout, clear, kept
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import EvalError, StorageError

WINDOWS = some_windows()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_models.reader(tmp_path_factory.mktemp("models"), "qwen2")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(source, tmp_path / "source")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(folder: Path, cache: Path | None, windows: list[Window] = WINDOWS, **more: object) -> Reference:
    return open_reference(folder, options(cache, **more), windows, QuietReporter())


def codes(reference: Reference) -> list[bytes]:
    rows = [reference.rows(i, window) for i, window in enumerate(WINDOWS)]
    return [part.tobytes() for row in rows for part in (row.codes, row.top, row.nll)]


def filled(folder: Path, cache: Path) -> Path:
    """The file of a fresh reference."""
    with opened(folder, cache) as reference:
        assert reference.path is not None and not reference.reused
        return reference.path


def test_rows_are_the_log_probabilities_of_the_source_in_two_bytes(source: Path, cache: Path) -> None:
    with opened(source, cache) as reference, exl.load(source, threads=1, context=256) as runtime:
        for index, window in enumerate(WINDOWS):
            rows = reference.rows(index, window)
            expected = torch.log_softmax(runtime.logits(window.ids)[:-1].double(), dim=1).numpy()
            p, logs = decode(rows.codes)
            assert np.abs(p - np.exp(expected)).max() < 2e-5
            likely = expected > -12
            assert np.abs(logs - expected)[likely].max() < 2e-2 and np.abs(logs - expected)[expected > -3].max() < 1e-4
            assert (rows.top == expected.argmax(axis=1)).all()
            targets = np.array(window.ids[1:])
            assert rows.nll == pytest.approx(-expected[np.arange(len(targets)), targets], abs=1e-5)
        tokens = sum(len(window.ids) - 1 for window in WINDOWS)
        assert reference.path is not None
        assert reference.path.stat().st_size < 2 * 131 * tokens + 12 * tokens + 1000
        assert sorted(cache.iterdir()) == [reference.path]
        assert str(reference.path) in reference.describe() and "kept in" in reference.describe()


def test_the_second_time_nothing_is_computed(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(source, cache) as reference:
        before = codes(reference)
    monkeypatch.setattr(opening, "open_model", None)
    with opened(source, cache) as reference:
        assert reference.reused and codes(reference) == before and "reused from" in reference.describe()


def test_without_a_cache_the_same_comes_out_and_nothing_is_kept(source: Path, cache: Path, tmp_path: Path) -> None:
    with opened(source, cache) as reference:
        before = codes(reference)
    listed = sorted(tmp_path.rglob("*"))
    with opened(source, None, reference_cache=tmp_path / "other") as reference:
        assert codes(reference) == before and reference.path is None
        reference.remember("floor", {"mean": 1.0})
        assert reference.recall("floor") is None
    assert sorted(tmp_path.rglob("*")) == listed
    with pytest.raises(ValueError, match="closed"):
        reference.rows(0, WINDOWS[0])


def change_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    before = path.stat()
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_the_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-4}))


def change_the_tokenizer(folder: Path) -> None:
    eval_models.write_tokenizer(folder, bos=False)


@pytest.mark.parametrize("change", [change_a_weight, change_the_config, change_the_tokenizer])
def test_a_source_that_changed_is_computed_anew(change, folder: Path, cache: Path) -> None:
    first = filled(folder, cache)
    change(folder)
    assert filled(folder, cache) != first


@pytest.mark.parametrize(
    "windows", [WINDOWS[:3], some_windows(first=2), [*WINDOWS[:3], Window((*WINDOWS[3].ids[:-1], 4), 1)]]
)
def test_another_text_is_another_reference(windows: list[Window], source: Path, cache: Path) -> None:
    first = filled(source, cache)
    with opened(source, cache, windows) as reference:
        assert not reference.reused and reference.path != first


def test_another_backend_is_another_reference(source: Path, cache: Path) -> None:
    first = filled(source, cache)
    with opened(source, cache, backend="reference") as reference:
        assert not reference.reused and reference.path != first


def test_a_large_file_is_known_by_samples_and_its_time(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_WHOLE", 1000)
    monkeypatch.setattr(identity, "_SAMPLE", 16)
    path = folder / "model.safetensors"
    first = filled(folder, cache)
    with opened(folder, cache) as reference:
        assert reference.reused
    data, facts = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1  # in the last sample
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    second = filled(folder, cache)
    data[len(data) // 2 + 100] ^= 1  # between samples: only the time tells
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert len({first, second, filled(folder, cache)}) == 3


def flip(at: int):
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def foreign(path: Path) -> None:
    path.write_bytes(b"something else")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip(-1), flip(5000), flip(3), flip(30), cut, lengthen, foreign, empty])
def test_a_damaged_file_is_told_in_one_line_and_made_anew(damage, source: Path, cache: Path) -> None:
    path = filled(source, cache)
    whole = path.read_bytes()
    damage(path)
    reporter = QuietReporter()
    with open_reference(source, options(cache), WINDOWS, reporter) as reference:
        assert not reference.reused
    (line,) = reporter.warned
    assert str(path) in line and line.endswith("it is computed anew") and "\n" not in line
    assert ("bytes instead of" in line) == (damage in (cut, lengthen))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, EvalError("NaN")])
def test_what_ends_the_work_early_leaves_nothing(
    error: BaseException, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = reference_file._pieces, []

    def some(layout: Layout, windows):
        for piece in real(layout, windows):
            calls.append(piece)
            if len(calls) == 6:
                raise error
            yield piece

    monkeypatch.setattr(reference_file, "_pieces", some)
    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        opened(source, cache)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    filled(source, cache)


def test_a_full_disk_is_known_before_anything_is_opened(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_model", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10_000))
    with pytest.raises(StorageError, match="the reference needs") as caught:
        opened(source, cache)
    assert "--no-reference-cache" in (caught.value.hint or "") and "\n" not in caught.value.problem


def test_a_folder_that_cannot_be_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file") as caught:
        opened(source, tmp_path / "file")
    assert "--reference-cache" in (caught.value.hint or "")


def test_two_writers_do_not_disturb_each_other(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(source, cache)
    with opened(source, cache) as reference:
        rows = [reference.rows(i, window) for i, window in enumerate(WINDOWS)]
        layout = Layout(path.stem, reference.vocab, tuple(len(r.top) for r in rows))
    whole = path.read_bytes()
    target = tmp_path / "two" / path.name
    turn, other = threading.Event(), threading.Event()

    def slow():
        yield rows[0]
        turn.set()
        assert other.wait(20)
        yield from rows[1:]

    finished: list[Path] = []

    def write_slowly() -> None:
        reference_file.write(target, layout, slow())
        finished.append(target)

    thread = threading.Thread(target=write_slowly)
    thread.start()
    assert turn.wait(20)
    with monkeypatch.context() as patch:  # as if in another process
        patch.setattr(os, "getpid", lambda: 1)
        reference_file.write(target, layout, iter(rows))
    assert target.read_bytes() == whole
    other.set()
    thread.join(20)
    assert finished == [target]
    assert target.read_bytes() == whole and list(target.parent.iterdir()) == [target]


def test_leftovers_of_killed_writers_go_away_and_fresh_ones_stay(source: Path, cache: Path) -> None:
    cache.mkdir()
    old, fresh = (cache / f"{'a' * 32}-{pid}.logprobs.partial" for pid in (1, 2))
    for path in (old, fresh):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    filled(source, cache)
    assert not old.exists() and fresh.exists()


def test_clearing_takes_what_is_ours(source: Path, cache: Path) -> None:
    path = filled(source, cache)
    with opened(source, cache) as reference:
        reference.remember("floor-bf16", {"mean": 1.0})
        assert reference.recall("floor-bf16") == {"mean": 1.0} and reference.recall("other") is None
    size = sum(file.stat().st_size for file in cache.iterdir())
    others = [cache / "notes.json", cache / "x.logprobs", cache / f"{'a' * 32}.txt"]
    for other in others:
        other.write_text("mine")
    (cache / f"{'a' * 32}-1.logprobs.partial").write_bytes(b"123")
    assert len(kept(cache)) == 3 and path in kept(cache)
    assert clear(cache) == (3, size + 3)
    assert sorted(cache.iterdir()) == sorted(others)
    assert clear(cache) == (0, 0) and clear(cache / "absent") == (0, 0)


def test_several_threads_may_read(source: Path, cache: Path) -> None:
    with opened(source, cache) as reference:
        expected = codes(reference)
        found: list[bool] = []
        threads = [
            threading.Thread(target=lambda: found.append(all(codes(reference) == expected for _ in range(20))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 3


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = options(None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(args) == tmp_path / "exl-runtime" / "reference"
    for unusable in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder(args) == Path.home() / ".cache" / "exl-runtime" / "reference"
    assert cache_folder(options(Path("~/here"))) == Path.home() / "here"


def test_no_window_is_one_line(source: Path, cache: Path) -> None:
    with pytest.raises(EvalError, match="no window to score"):
        opened(source, cache, [])


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_same_tokenizer_is_no_matter(source: Path, demo: Path, ember: Path, cache: Path, tmp_path: Path) -> None:
    require_comparable(source, variant(source, tmp_path / "v", 0.1))
    require_comparable(ember, demo)
    with opened(source, cache) as reference, exl.load(source, threads=1, context=256) as runtime:
        require_same_tokenizer(reference, runtime)


def other_order(folder: Path) -> None:
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    vocab = facts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(facts))


def without_bos(folder: Path) -> None:
    eval_models.write_tokenizer(folder, bos=False)


def more_logits(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 144}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_order, r"token \d+ is 'a' in one and 'b' in the other"),
        (without_bos, "cut the same text into different tokens"),
        (more_logits, "the models have 131 and 144 logits per token"),
    ],
)
def test_another_tokenizer_is_one_line(change, why: str, source: Path, folder: Path) -> None:
    change(folder)
    with pytest.raises(EvalError, match=f"qwen2-bos and source cannot be compared: .*{why}") as caught:
        require_comparable(source, folder)
    assert "\n" not in caught.value.problem and caught.value.hint


def test_another_vocabulary_is_one_line(source: Path, demo: Path, cache: Path) -> None:
    with pytest.raises(EvalError, match="their tokenizers have 100 and 2048 tokens"):
        require_comparable(source, demo)
    with (
        opened(source, cache) as reference,
        exl.load(demo, threads=1, context=64) as runtime,
        pytest.raises(EvalError, match="qwen2-bos and demo cannot be compared: their tokenizers have 100 and 2048"),
    ):
        require_same_tokenizer(reference, runtime)
