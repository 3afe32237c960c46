"""Facts about this machine that decide whether and how fast the runtime works here. Prints nothing, builds nothing."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from exl_runtime.errors import BackendUnavailable
from ext import cache as caches
from ext import cuda_doctor
from ext.build import Settings, plan_for
from ext.facts import Check, library_check
from ext.lock import held, owner
from ext.toolchain import INSTALL_COMPILER, find_compiler, find_ninja, free_memory

OPTIONAL = {  # distribution: what one gains by it
    "flash-attn": "faster prompts on NVIDIA GPUs, with a cache of fp16",
    "llguidance": "answers bound to a grammar: JSON schema, regex, Lark, choices",
    "transformers": "the tests, which compare with it",
}
LOW_MEMORY = 2 << 30
LOW_DISK = 1 << 30


def checks(settings: Settings | None = None) -> list[Check]:
    """All facts, in the order in which a person would want them. Takes about a second, since it imports torch."""
    chosen = Settings.from_environment() if settings is None else settings
    cache = chosen.open_cache()
    return [
        _python(),
        *_torch(),
        _tool("compiler", lambda: _compiler_line(chosen), INSTALL_COMPILER),
        _tool("ninja", find_ninja, f"{sys.executable} -m pip install ninja"),
        _cache(chosen, cache),
        _library(chosen, cache),
        _cpu(),
        _memory(),
        _disk(cache),
        *cuda_doctor.checks(chosen, cache),
        *(_optional(name, gain) for name, gain in OPTIONAL.items()),
    ]


def _python() -> Check:
    good = sys.version_info >= (3, 10)
    detail = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    return Check("python", good, detail, None if good else "install Python 3.10 or newer")


def _torch() -> list[Check]:
    advice = f"{sys.executable} -m pip install 'torch>=2.11'"
    try:
        import torch
    except (ImportError, OSError) as err:
        return [Check("torch", False, f"does not import: {err}", advice)]
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return [
        Check("torch", release >= (2, 11), f"{torch.__version__} ({build})", None if release >= (2, 11) else advice)
    ]


def _tool(name: str, find: Callable[[], str], advice: str) -> Check:
    try:
        return Check(name, True, find())
    except BackendUnavailable as err:
        return Check(name, False, err.problem, err.hint or advice)


def _compiler_line(settings: Settings) -> str:
    compiler = find_compiler(settings.compiler)
    return f"{compiler.version} ({compiler.path})"


def _cache(settings: Settings, cache: Path) -> Check:
    builds = sum(1 for _ in caches.finished_builds(cache))
    detail = f"{cache}: {builds} built, {caches.size_of(cache) / 1e6:.1f} MB"
    lock = cache / caches.LOCK
    if held(lock):
        return Check("build cache", None, f"{detail}; {owner(lock)} is building in it now")
    if settings.cache is not None and cache != settings.cache.expanduser().resolve():
        return Check("build cache", False, detail, f"make {settings.cache} writable, or set EXL_CACHE_DIR")
    return Check("build cache", True, detail)


def _library(settings: Settings, cache: Path) -> Check:
    return library_check("native kernels", cache, lambda: plan_for(settings).key, "in under a minute")


def _cpu() -> Check:
    model, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
                break
    except OSError:
        pass
    has = set(flags.split())
    names = [n for n in ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "asimd") if n in has]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    slow = platform.machine().lower() in ("x86_64", "amd64") and bool(has) and not {"avx2", "fma"} <= has
    advice = "without AVX2 the portable kernels run, several times slower" if slow else None
    return Check("cpu", not slow, f"{model}, {cpus} usable CPUs, {' '.join(names) or 'no known extensions'}", advice)


def _memory() -> Check:
    free = free_memory()
    if free is None:
        return Check("memory", None, "unknown")
    good = free >= LOW_MEMORY
    return Check("memory", good, f"{free / 2**30:.1f} GiB free", None if good else "close other programs")


def _disk(cache: Path) -> Check:
    try:
        free = shutil.disk_usage(cache).free
    except OSError as err:
        return Check("disk", None, f"unknown: {err}")
    good = free >= LOW_DISK
    return Check("disk", good, f"{free / 2**30:.1f} GiB free at {cache}", None if good else "free some space")


def _optional(distribution: str, gain: str) -> Check:
    try:
        return Check(distribution, None, f"{importlib.metadata.version(distribution)}: {gain}")
    except importlib.metadata.PackageNotFoundError:
        return Check(distribution, None, f"not installed; optional, for {gain}")
