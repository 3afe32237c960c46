"""Builds the programs in tests/cuda/native: CUDA kernels run by emulation, plain or under a sanitizer.

Objects and programs are kept in the build cache under a name made of everything that went into them, so that a second
run of the tests builds nothing.
"""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
from kept import kept, sweep

from exl_runtime.errors import BackendUnavailable
from ext.build import Settings
from ext.toolchain import Compiler, find_compiler

ROOT = Path(__file__).resolve().parents[1]
EXT = ROOT / "ext"
RUNTIME = tuple(EXT / "emulation" / f"cuda_{part}.cpp" for part in ("host", "sync", "warp"))

COMMON = ("-std=c++17", "-ffp-contract=off", "-g1", "-Wno-unknown-pragmas")
MODES = {
    "plain": ("-O1",),
    "portable": ("-O1", "-DEXL_EMU_UCONTEXT"),  # how fibers switch on machines other than x86-64
    "asan": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    "tsan": ("-O1", "-fsanitize=thread"),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "report_signal_unsafe=0:halt_on_error=1:history_size=2",
}


def program(driver: Path, mode: str, *, kernels: tuple[Path, ...] | None = None) -> Path:
    """The program of `driver` in `mode`, built if need be. Skips the test where there is no compiler or sanitizer.

    `kernels` are by default those that the driver's comment `// kernels: a.cu b.cu` names.
    """
    try:
        compiler = find_compiler(os.environ.get("CXX") or None)
    except BackendUnavailable as err:
        pytest.skip(str(err))
    cache = Settings.from_environment().open_cache() / "emulated" / "programs"
    cache.mkdir(parents=True, exist_ok=True)
    sweep(cache)
    flags = (*COMMON, *MODES[mode])
    runtime = (*COMMON, "-O2", "-Wall", "-Wextra", *(flag for flag in MODES[mode] if flag.startswith("-D")))
    objects = [_object(compiler, cache, file, runtime) for file in RUNTIME]
    for source in (driver, *(_kernels_of(driver) if kernels is None else kernels)):
        objects.append(_object(compiler, cache, source, flags))
    name = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:20]
    target = cache / f"{driver.stem}-{mode}-{name}"
    return _run(compiler, [*flags, *map(str, objects)], target)


def run(target: Path, *arguments: str, timeout: float = 240.0) -> "subprocess.CompletedProcess[str]":
    """What the program says; its status and output."""
    return subprocess.run(
        [str(target), *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env={**os.environ, **ENVIRONMENT},
    )


def _kernels_of(driver: Path) -> tuple[Path, ...]:
    named = re.search(r"^// kernels:(.*)$", driver.read_text(encoding="utf-8"), re.MULTILINE)
    assert named is not None, f"{driver.name} does not name its kernels"
    return tuple(EXT / "cuda" / name for name in named.group(1).split())


def inputs_of(source: Path, seen: dict[Path, bytes] | None = None) -> dict[Path, bytes]:
    """The content of a source and of all our own headers below it."""
    found = {} if seen is None else seen
    source = Path(os.path.normpath(source))
    if source in found or not source.is_file():
        return found
    found[source] = source.read_bytes()
    for name in re.findall(rb'^\s*#\s*include "([^"]+)"', found[source], re.MULTILINE):
        inputs_of(source.parent / name.decode(), found)
    return found


def key_of(source: Path, facts: tuple[str, ...]) -> str:
    """A name for what a tool makes of `source` now, `facts` being the tool and its flags."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for path, content in sorted(inputs_of(source).items()):
        digest.update(f"{os.path.relpath(path, ROOT)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:20]


def _object(compiler: Compiler, cache: Path, source: Path, flags: tuple[str, ...]) -> Path:
    target = cache / f"{source.stem}-{key_of(source, (compiler.identity, *flags))}.o"
    return _run(compiler, [*flags, "-c", "-x", "c++", str(source)], target)


def _run(compiler: Compiler, arguments: list[str], target: Path) -> Path:
    """What the compiler makes of them."""

    def call(beside: Path) -> None:
        done = subprocess.run([compiler.path, *arguments, "-o", str(beside)], capture_output=True, text=True)
        if done.returncode != 0 and "cannot find" in done.stderr and "san" in done.stderr:
            pytest.skip("this compiler comes without its sanitizers")
        assert done.returncode == 0, f"{target.name} does not build\n{done.stderr[:6000]}"

    return kept(target, call)
