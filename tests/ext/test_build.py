"""The build driver: one build, whatever happens to the processes around it."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from exl_runtime.errors import BackendUnavailable, BuildError
from ext import cache as caches
from ext.build import Built, Settings, build, clean, load, plan_for
from ext.lock import file_lock, held, owner
from ext.plan import ninja_file

ROOT = Path(__file__).resolve().parents[2]


def quiet(_: str) -> None:
    """A progress callback that tells nobody."""


def python(code: str, settings: Settings, **environment: str) -> "subprocess.Popen[str]":
    """Another process that has `settings` and the build module."""
    head = (
        "from pathlib import Path\nfrom ext.build import *\nfrom ext import lock\nimport time\n"
        f"settings = Settings(root=Path({str(settings.root)!r}), cache=Path({str(settings.cache)!r}),"
        f" compiler={settings.compiler!r}, timeout=60.0)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def slow_down(settings: Settings, seconds: float) -> Settings:
    """One more source, and a compiler that thinks about it for a while."""
    (settings.root / "cpu" / "slow.cpp").write_text("int slow() { return 1; }\n")
    compiler = settings.root.parent / "slow-g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *slow.cpp*) sleep {seconds};; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    return dataclasses.replace(settings, compiler=str(compiler))


def test_build_load_and_reuse(loadable: tuple[Settings, str]) -> None:
    settings, namespace = loadable
    seen: list[str] = []
    built = load(settings, seen.append)
    assert built.fresh and built.file.is_file()
    assert getattr(torch.ops, namespace).number() == 42
    assert seen[-1].startswith("native kernels are ready")
    assert sorted(p.name for p in built.file.parent.iterdir()) == ["exl.so", "manifest.json"]
    again = build(settings, quiet)
    assert (again.file, again.fresh) == (built.file, False)


def test_a_warm_start_runs_no_process_and_takes_no_lock(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tiny, quiet)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a warm start must not do this")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr("ext.build.file_lock", refuse)
    assert not build(tiny, quiet).fresh


def test_any_change_of_sources_flags_compiler_or_torch_is_another_key(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan_for(tiny)
    header = tiny.root / "common" / "number.h"
    header.write_text(header.read_text().replace("41", "40"))
    changed = plan_for(tiny)
    assert changed.key != first.key
    monkeypatch.setattr("ext.plan.COMMON_FLAGS", ("-O1",))
    assert plan_for(tiny).key != changed.key
    monkeypatch.undo()
    assert plan_for(tiny).key == changed.key
    monkeypatch.setattr("ext.build.find_torch", lambda: dataclasses.replace(first.torch, version="2.99.1"))
    assert plan_for(tiny).key != changed.key
    monkeypatch.undo()
    shim = tiny.root.parent / "g++"
    shim.write_text('#!/bin/sh\nexec g++ "$@"\n')
    shim.chmod(0o755)
    assert plan_for(dataclasses.replace(tiny, compiler=str(shim))).key != changed.key


def test_instruction_sets_come_from_file_names(tiny: Settings) -> None:
    (tiny.root / "cpu" / "wide_avx2.cpp").write_text("int wide() { return __AVX2__; }\n")
    (tiny.root / "cpu" / "wide_avx512vnni.cpp").write_text("int wider() { return __AVX512VNNI__; }\n")
    (tiny.root / "cpu" / "plain.cpp").write_text("#ifdef __AVX__\n#error baseline\n#endif\nint plain() { return 1; }\n")
    build(tiny, quiet)
    text = ninja_file(plan_for(tiny))
    assert re.search(r"wide_avx512vnni.kernel.o: .*\n  extra = .*-mavx512vnni", text)
    assert not re.search("march=native|fast-math|Ofast", text)


def test_broken_source_says_what_and_where_the_log_is(tiny: Settings) -> None:
    (tiny.root / "cpu" / "broken.cpp").write_text("int f( { return unknown_name; }\n")
    with pytest.raises(BuildError) as caught:
        build(tiny, quiet)
    text = str(caught.value)
    assert "broken.cpp:1" in text and "error" in text
    log = Path(re.search(r"log: (\S+)", text).group(1))
    assert "broken.cpp" in log.read_text()
    assert not list(tiny.cache.glob(f"{caches.PARTIAL}*")) and not held(tiny.cache / caches.LOCK)
    (tiny.root / "cpu" / "broken.cpp").write_text("int f() { return 1; }\n")
    assert build(tiny, quiet).fresh


def test_kill_9_in_mid_build_leaves_the_next_start_working(tiny: Settings) -> None:
    tiny = slow_down(tiny, 5)
    process = python("build(settings)", tiny)
    wait_for(lambda: list(tiny.cache.glob(f"{caches.PARTIAL}*/*.o")) or process.poll() is not None)
    assert process.poll() is None and held(tiny.cache / caches.LOCK)
    process.kill()
    process.wait()
    wait_for(lambda: not held(tiny.cache / caches.LOCK), 2.0)  # the lock died with it
    assert list(tiny.cache.glob(f"{caches.PARTIAL}*"))
    (tiny.root / "cpu" / "slow.cpp").unlink()
    started = time.monotonic()
    assert build(tiny, quiet).fresh
    assert time.monotonic() - started < 4  # it waits for nothing that the dead process began
    assert not list(tiny.cache.glob(f"{caches.PARTIAL}*"))


def test_ctrl_c_ends_the_compilers_and_cleans_up(tiny: Settings) -> None:
    tiny = slow_down(tiny, 5)
    process = python("build(settings)", tiny)
    wait_for(lambda: list(tiny.cache.glob(f"{caches.PARTIAL}*/*.o")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in errors
    assert not list(tiny.cache.glob(f"{caches.PARTIAL}*"))


def test_two_processes_at_once_build_once(tiny: Settings) -> None:
    tiny = slow_down(tiny, 0.7)
    code = "b = build(settings); print(b.fresh, b.file.stat().st_size)"
    both = [python(code, tiny) for _ in range(2)]
    outputs = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    answers = sorted(out.split() for out, _ in outputs)
    assert [a[0] for a in answers] == ["False", "True"] and answers[0][1] == answers[1][1]
    waiting = next(err for out, err in outputs if out.startswith("False"))
    assert re.search(r"waiting for process \d+, which is building", waiting)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_library_is_built_again(tiny: Settings, damage: str) -> None:
    library = build(tiny, quiet).file
    content = bytearray(library.read_bytes())
    if damage == "remove":
        library.unlink()
    else:
        content[len(content) // 2] ^= 1
        library.write_bytes({"truncate": content[:-100], "flip": content, "empty": b""}[damage])
    again = build(tiny, quiet)
    assert again.fresh and again.file == library and caches.verified(library.parent) is not None


def test_a_library_that_verifies_but_does_not_load_is_built_again_once(
    loadable: tuple[Settings, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, namespace = loadable
    folder = build(settings, quiet).file.parent
    (folder / "exl.so").write_bytes(b"not a library")
    caches.write_manifest(folder, "exl.so", seconds=1, compiler="", torch="")
    assert load(settings, quiet).fresh
    assert getattr(torch.ops, namespace).number() == 42

    def broken(*_: object, again: bool = False, **_more: object) -> Built:
        (folder / "other.so").write_bytes(b"still not a library")
        return Built(file=folder / "other.so", key="", fresh=again, seconds=0)

    monkeypatch.setattr("ext.build.build", broken)
    with pytest.raises(BuildError, match="built again but does not load"):
        load(settings, quiet)


def test_waiting_for_a_live_owner_reports_it_and_ends_with_it(tiny: Settings) -> None:
    tiny.cache.mkdir()
    code = "with lock.file_lock(settings.cache / 'build.lock', timeout=5, report=print):\n    time.sleep(60)"
    process = python(code, tiny)
    lock = tiny.cache / caches.LOCK
    wait_for(lambda: held(lock))
    wait_for(lambda: str(process.pid) in owner(lock))
    seen: list[str] = []
    killer = threading.Timer(0.7, process.kill)
    killer.start()
    started = time.monotonic()
    assert build(tiny, seen.append).fresh
    assert time.monotonic() - started >= 0.5
    assert any(f"waiting for process {process.pid}" in line for line in seen)
    process.wait()


def test_waiting_ends_at_the_timeout_with_the_owner_in_the_message(tiny: Settings) -> None:
    tiny.cache.mkdir()
    lock = tiny.cache / caches.LOCK
    with file_lock(lock, timeout=1, report=quiet):
        started = time.monotonic()
        with pytest.raises(BuildError, match=rf"process {os.getpid()} has held"):
            build(dataclasses.replace(tiny, timeout=0.4), quiet)
        assert time.monotonic() - started < 3
        with pytest.raises(BuildError, match="is building"):
            clean(tiny, wait=0.1)
    assert not held(lock)


def test_a_build_that_takes_too_long_is_ended(tiny: Settings) -> None:
    tiny, started = slow_down(tiny, 6), time.monotonic()
    with pytest.raises(BuildError, match=r"did not finish in time .*log: ") as caught:
        build(dataclasses.replace(tiny, timeout=0.3), quiet)
    assert "hint" in str(caught.value)
    assert time.monotonic() - started < 5  # the compiler was ended, not awaited
    assert not list(tiny.cache.glob(f"{caches.PARTIAL}*")) and not held(tiny.cache / caches.LOCK)


def test_sources_edited_during_the_build_are_built_again(tiny: Settings) -> None:
    tiny = slow_down(tiny, 0.7)
    header = tiny.root / "common" / "number.h"
    first = plan_for(tiny).key

    def edit(message: str) -> None:
        if "building" in message and "41" in header.read_text():
            header.write_text(header.read_text().replace("41", "7"))

    built = build(tiny, edit)
    assert built.key == plan_for(tiny).key != first
    assert [f.name for f in caches.finished_builds(tiny.cache.resolve())] == [built.key]


def test_an_unwritable_cache_falls_back_to_a_private_folder_with_one_warning(
    tiny: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    settings = dataclasses.replace(tiny, cache=blocked / "cache")
    built = build(settings, quiet)
    build(settings, quiet)
    private = built.file.parents[1]
    assert private.parent == tmp_path / "t" and private.stat().st_mode & 0o077 == 0
    assert sum("cannot write to the build cache" in record.message for record in caplog.records) == 1


def test_a_private_folder_that_others_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"exl_runtime-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert Settings(cache=blocked / "x").open_cache() != planted


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXL_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Settings.from_environment().open_cache() == tmp_path / "xdg" / "exl_runtime"
    monkeypatch.setenv("EXL_CACHE_DIR", str(tmp_path / "own"))
    assert Settings.from_environment().open_cache() == tmp_path / "own"
    monkeypatch.delenv("EXL_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Settings.from_environment().open_cache() == tmp_path / "home" / ".cache" / "exl_runtime"


def test_clean_removes_builds_and_only_them(tiny: Settings) -> None:
    library = build(tiny, quiet).file
    (tiny.cache / f"{caches.PARTIAL}dead-1").mkdir()
    size = library.stat().st_size
    assert clean(tiny) >= size
    assert [p.name for p in tiny.cache.iterdir()] == [caches.LOCK]
    assert build(tiny, quiet).fresh


def test_old_builds_are_dropped_and_the_newest_kept(tiny: Settings) -> None:
    kept = build(tiny, quiet).file.parent
    for age in range(caches.KEEP_BUILDS + 3):
        other = tiny.cache / f"{age:020d}"
        other.mkdir()
        (other / caches.MANIFEST).write_text("{}")
        os.utime(other, (1000 + age, 1000 + age))
    build(tiny, quiet, again=True)
    names = {f.name for f in caches.finished_builds(tiny.cache)}
    assert names == {kept.name, *(f"{age:020d}" for age in range(3, caches.KEEP_BUILDS + 3))}


def test_no_compiler_says_what_to_install(tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler") as caught:
        build(tiny, quiet)
    assert "apt install" in str(caught.value)
    with pytest.raises(BackendUnavailable, match="'nonesuch' of the environment variable CXX"):
        build(dataclasses.replace(tiny, compiler="nonesuch"), quiet)


def test_ninja_is_found_without_an_activated_environment(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++" if "+" in name else None)
    if not Path("/usr/bin/g++").exists():
        pytest.skip("no g++ in /usr/bin")
    assert build(tiny, quiet).fresh
