"""The facts of `exl doctor`."""

import dataclasses
from pathlib import Path

import pytest

from ext import cache as caches
from ext.build import Settings, build, plan_for
from ext.doctor import Check, checks
from ext.lock import file_lock


def facts(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in checks(settings)}


def test_facts_of_this_machine(tiny: Settings) -> None:
    found = facts(tiny)
    assert {
        "python",
        "torch",
        "compiler",
        "ninja",
        "build cache",
        "native kernels",
        "cpu",
        "memory",
        "disk",
        "gpu",
    } <= set(found)
    assert found["python"].ok and found["torch"].ok and found["compiler"].ok and found["ninja"].ok
    assert found["native kernels"].ok is None and "not built yet" in found["native kernels"].detail
    for check in found.values():
        assert check.detail
        assert check.ok is not False or check.advice, check


def test_the_library_is_followed_through_its_life(tiny: Settings) -> None:
    library = build(tiny, lambda _: None).file
    assert facts(tiny)["native kernels"].ok and str(library) in facts(tiny)["native kernels"].detail
    library.write_bytes(b"")
    assert "damaged" in facts(tiny)["native kernels"].detail
    (tiny.root / "cpu" / "number.cpp").write_text("int number( {")
    log = tiny.cache / "logs" / f"{plan_for(tiny).key}.log"
    log.write_text("error")
    broken = facts(tiny)["native kernels"]
    assert broken.ok is False and str(log) in broken.detail
    with file_lock(tiny.cache / caches.LOCK, timeout=1, report=print):
        assert "is building in it now" in facts(tiny)["build cache"].detail


def test_what_is_missing_comes_with_advice(tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = facts(tiny)
    assert found["compiler"].ok is False and "apt install" in found["compiler"].advice
    assert found["native kernels"].ok is False and "cannot be built" in found["native kernels"].detail
    assert facts(dataclasses.replace(tiny, disabled=True))["native kernels"].ok is False
