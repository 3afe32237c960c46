"""Finds what a build needs on this machine: a C++ compiler, ninja, torch's headers. Builds nothing."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from exl_runtime.errors import BackendUnavailable

COMPILER_NAMES = ("g++", "clang++", "c++")
TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11: the binary runs on that release and all later ones
MEMORY_PER_JOB = 700 << 20  # bytes; the largest translation unit peaks well below
INSTALL_COMPILER = "install a C++17 compiler (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A C++ compiler. `identity` changes whenever the program behind `path` does."""

    path: str
    version: str  # first line of --version
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFiles:
    """Where the installed torch keeps what an extension needs; found without importing it."""

    version: str
    include: Path
    lib: Path


def machine() -> str:
    """ "linux-x86_64" and the like: what one binary runs on."""
    return f"{sys.platform}-{platform.machine().lower()}"


def is_x86_64() -> bool:
    """Whether the files of the x86 instruction sets belong to the build."""
    return platform.machine().lower() in ("x86_64", "amd64")


def find_compiler(preferred: str | None, memo: Path | None = None) -> Compiler:
    """The compiler named by `preferred`, else the first known one on PATH.

    Asking a compiler for its version takes a process; `memo`, a JSON file, keeps the answer for as long as path, size
    and time of the program stay the same. Raises BackendUnavailable, saying what to install.
    """
    names = (preferred,) if preferred else COMPILER_NAMES
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        looked = f"the compiler {preferred!r} of the environment variable CXX" if preferred else "no C++ compiler"
        was = "is not there" if preferred else f"found (looked for {', '.join(COMPILER_NAMES)} on PATH)"
        raise BackendUnavailable(f"{looked} {was}", hint=INSTALL_COMPILER)
    real = os.path.realpath(found)
    state = os.stat(real)
    stamp = f"{found}|{real}|{state.st_size}|{state.st_mtime_ns}"
    known = _read_memo(memo)
    version = known.get(stamp)
    if version is None:
        version = _ask_version(found)
        if memo is not None:
            _write_memo(memo, {**known, stamp: version})
    return Compiler(path=found, version=version, identity=f"{stamp}|{version}")


def _ask_version(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as err:
        raise BackendUnavailable(f"{path} --version fails: {err}", hint=INSTALL_COMPILER) from err
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else "unknown version"


def _read_memo(memo: Path | None) -> dict[str, str]:
    if memo is None:
        return {}
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(key, str) and isinstance(value, str)}


def _write_memo(memo: Path, known: dict[str, str]) -> None:
    beside = memo.with_name(f"{memo.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(dict(list(known.items())[-8:])), encoding="utf-8")
        os.replace(beside, memo)
    except OSError:
        return  # only a saved question: the next start asks again


def find_ninja() -> str:
    """ninja of the pip package, wherever its environment is and activated or not; else the system's."""
    if (spec := importlib.util.find_spec("ninja")) is not None and spec.origin is not None:
        import ninja

        program = Path(ninja.BIN_DIR) / ("ninja.exe" if sys.platform == "win32" else "ninja")
        if program.is_file():
            return str(program)
    if (system := shutil.which("ninja")) is not None:
        return system
    raise BackendUnavailable("ninja, which runs the build, is missing", hint=f"{sys.executable} -m pip install ninja")


def find_torch() -> TorchFiles:
    """Raises BackendUnavailable when torch is not installed or comes without headers."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("torch is not installed", hint=f"{sys.executable} -m pip install 'torch>=2.11'")
    root = Path(next(iter(spec.submodule_search_locations)))
    include = root / "include"
    if not (include / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BackendUnavailable(
            f"the torch in {root} has no headers of its stable ABI",
            hint="install torch 2.11 or newer from its official wheels",
        )
    version = "unknown"
    for line in (root / "version.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__ = "):
            version = line.split("=", 1)[1].strip().strip("'\"")
    return TorchFiles(version=version, include=include, lib=root / "lib")


def free_memory() -> int | None:
    """Bytes of RAM that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def parallel_jobs() -> int:
    """Compilers to run at once: the CPUs this process may use, fewer when memory is short."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = free_memory()
    return max(1, cpus if memory is None else min(cpus, memory // MEMORY_PER_JOB))
