"""Builds the native library on first use and loads it: `load()` is all that the rest of the program needs.

A finished build is found by its key without a lock and without starting a process. Otherwise one process builds while
the others wait on an operating-system lock; the result appears by one rename, so a build that is killed at any moment
leaves nothing that a later start could mistake for a library, and no lock.

The environment is read here and nowhere else:

    EXL_CACHE_DIR       folder for built libraries (default $XDG_CACHE_HOME/exl_runtime or ~/.cache/exl_runtime)
    EXL_DISABLE_NATIVE  "1": behave as if no compiler were there; for debugging
    CXX                 the C++ compiler to use
    CUDA_HOME           the folder of the CUDA toolkit to use (else CUDA_PATH)
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exl_runtime.errors import BackendUnavailable, BuildError
from ext import cache as caches
from ext.lock import file_lock, owner
from ext.plan import BINDINGS, LIBRARY, Plan, binding_unit, make_plan, ninja_file
from ext.progress import StandardError
from ext.recipe import NINJA, Recipe
from ext.toolchain import find_compiler, find_ninja, find_torch, parallel_jobs

Progress = Callable[[str], None]
ERROR_LINES = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where to build what. The defaults are for tests and tools; programs use `from_environment`."""

    root: Path = Path(__file__).parent  # the folder with binding/, cpu/, cuda/, common/
    cache: Path | None = None  # None: the user's cache folder
    xdg_cache: str | None = None
    compiler: str | None = None  # None: the first known one on PATH
    cuda_home: str | None = None  # None: nvcc on PATH, or in the usual places
    disabled: bool = False
    timeout: float = 600.0  # seconds, waiting for another process's build included

    @classmethod
    def from_environment(cls) -> "Settings":
        """The settings of this process."""
        folder = os.environ.get("EXL_CACHE_DIR")
        return cls(
            cache=Path(folder) if folder else None,
            xdg_cache=os.environ.get("XDG_CACHE_HOME"),
            compiler=os.environ.get("CXX") or None,
            cuda_home=os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or None,
            disabled=os.environ.get("EXL_DISABLE_NATIVE", "") not in ("", "0"),
        )

    def open_cache(self) -> Path:
        """The cache folder, created."""
        return caches.open_cache(self.cache, self.xdg_cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A library that is ready to be loaded."""

    file: Path
    key: str
    fresh: bool  # built by this call
    seconds: float  # what the build took, whenever that was


def plan_for(settings: Settings) -> Plan:
    """What these settings would build now. Raises BackendUnavailable if this machine cannot."""
    if settings.disabled:
        raise BackendUnavailable("native kernels are switched off by EXL_DISABLE_NATIVE", hint="unset it to use them")
    if not sys.platform.startswith("linux"):
        raise BackendUnavailable(f"native kernels are built on Linux only, this is {sys.platform}")
    cache = settings.open_cache()
    compiler = find_compiler(settings.compiler, cache / "compilers.json")
    return make_plan(settings.root, compiler, find_torch())


def recipe_for(settings: Settings) -> Recipe:
    """How to build the CPU kernels with these settings. Raises BackendUnavailable if this machine cannot."""
    plan = plan_for(settings)
    return Recipe(
        key=plan.key,
        output=LIBRARY,
        title="native kernels",
        files={NINJA: ninja_file(plan), BINDINGS: binding_unit(plan)},
        compiler=f"{plan.compiler.path} ({plan.compiler.version})",
        torch=plan.torch.version,
    )


MakeRecipe = Callable[[Settings], Recipe]


def build(
    settings: Settings, progress: Progress | None = None, *, again: bool = False, make: MakeRecipe = recipe_for
) -> Built:
    """The library that `make` describes, built now unless a whole one is cached. `again` builds in any case.

    Raises BackendUnavailable (no compiler, no ninja, switched off) or BuildError (it did not compile, time is up).
    """
    return _build(settings, progress, again, time.monotonic() + settings.timeout, make)


def _build(settings: Settings, progress: Progress | None, again: bool, deadline: float, make: MakeRecipe) -> Built:
    recipe = make(settings)
    cache = settings.open_cache()
    final = cache / recipe.key
    if not again and (known := caches.verified(final)) is not None:
        return Built(file=final / known.file, key=recipe.key, fresh=False, seconds=known.seconds)
    ninja = find_ninja()
    report = StandardError() if progress is None else progress
    with file_lock(cache / caches.LOCK, timeout=deadline - time.monotonic(), report=report):
        if not again and (known := caches.verified(final)) is not None:  # built while we waited
            return Built(file=final / known.file, key=recipe.key, fresh=False, seconds=known.seconds)
        caches.sweep(cache, keep=recipe.key)  # we hold the lock: whoever made a partial folder is dead
        started = time.monotonic()
        partial = cache / f"{caches.PARTIAL}{recipe.key}-{os.getpid()}"
        partial.mkdir()
        log = cache / "logs" / f"{recipe.key}.log"
        try:
            _compile(recipe, partial, ninja, log, deadline, report)
            seconds = time.monotonic() - started
            unchanged = make(settings).key == recipe.key
            for leftover in partial.iterdir():
                if leftover.name != recipe.output:
                    leftover.unlink()
            caches.write_manifest(partial, recipe.output, seconds=seconds, compiler=recipe.compiler, torch=recipe.torch)
            if unchanged:
                caches.install(partial, final)
        except OSError as err:
            raise BuildError(
                f"the build in {cache} failed: {err}",
                hint="free some disk space, or set EXL_CACHE_DIR to another folder",
            ) from err
        finally:
            if partial.exists():
                caches.discard(partial)
        report(f"{recipe.title} are ready ({seconds:.0f} s)" if unchanged else "a source changed meanwhile: once more")
    if not unchanged:  # the result is not what its key says
        return _build(settings, progress, again, deadline, make)
    return Built(file=final / recipe.output, key=recipe.key, fresh=True, seconds=seconds)


def load(settings: Settings | None = None, progress: Progress | None = None, *, make: MakeRecipe = recipe_for) -> Built:
    """Build if necessary, and register the operators with torch. Once per process.

    A cached library that does not load is built again, once.
    """
    import torch

    chosen = Settings.from_environment() if settings is None else settings
    built = build(chosen, progress, make=make)
    try:
        torch.ops.load_library(built.file)
    except OSError as first:
        if built.fresh:
            raise BuildError(f"{built.file} was built but does not load: {first}") from first
        built = build(chosen, progress, again=True, make=make)
        try:
            torch.ops.load_library(built.file)
        except OSError as second:
            raise BuildError(f"{built.file} was built again but does not load: {second}") from second
    return built


def clean(settings: Settings | None = None, *, wait: float = 5.0) -> int:
    """Remove all built libraries; returns the bytes freed. Raises BuildError while another process builds."""
    cache = (Settings.from_environment() if settings is None else settings).open_cache()
    try:
        with file_lock(cache / caches.LOCK, timeout=wait, report=lambda _: None):
            return caches.remove_all(cache)
    except BuildError as err:
        raise BuildError(
            f"{owner(cache / caches.LOCK)} is building in {cache}", hint="clean once it has finished"
        ) from err


def _compile(recipe: Recipe, folder: Path, ninja: str, log: Path, deadline: float, report: Progress) -> None:
    """Run ninja in `folder`, telling `report` about every second how far it is. Raises BuildError."""
    log.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    for name, text in recipe.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    command = [ninja, "-C", str(folder), "-j", str(parallel_jobs()), "-v"]
    with open(log, "w", encoding="utf-8", errors="replace") as out:
        out.write(f"{recipe.compiler}; torch {recipe.torch}\n{' '.join(command)}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"},
                start_new_session=True,  # so that the compilers can be ended together with it
            )
        except OSError as err:
            raise BuildError(f"cannot start {ninja}: {err}") from err
        counter = _Counter(process, out)
        try:
            while True:
                elapsed = time.monotonic() - started
                report(f"building {recipe.title}, once: {counter.done}/{recipe.steps} files, {elapsed:.0f} s")
                if counter.finished.wait(0.5):
                    break
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"the build of the {recipe.title} did not finish in time (after {elapsed:.0f} s); log: {log}",
                        hint="see what the machine is busy with, then start again",
                    )
            try:  # its output has ended, so it is about to
                status = process.wait(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as err:
                raise BuildError(f"ninja does not end; log: {log}", hint="start again") from err
        finally:
            _end(process)
            counter.join()
    if status != 0:
        raise BuildError(
            f"the {recipe.title} do not compile with {recipe.compiler}\n{counter.error_text()}\n  log: {log}",
            hint="the program runs without them, slowly; set EXL_DISABLE_NATIVE=1 to stop trying",
        )


class _Counter(threading.Thread):
    """Copies ninja's output to the log and counts the finished files."""

    def __init__(self, process: "subprocess.Popen[str]", log: object) -> None:
        super().__init__(name="exl-build-log", daemon=True)
        self.lines: list[str] = []
        self.done = 0
        self.finished = threading.Event()
        self._process, self._log = process, log
        self.start()

    def run(self) -> None:
        """Until ninja and all its children have closed the pipe."""
        try:
            for line in self._process.stdout or ():
                with contextlib.suppress(OSError):  # a full disk: the pipe must be emptied all the same
                    self._log.write(line)
                    self._log.flush()
                self.lines.append(line.rstrip())
                if line.startswith("[") and "/" in line[:12]:
                    count = line[1:].split("/", 1)[0]
                    self.done = int(count) if count.isdigit() else self.done
        finally:
            self.finished.set()

    def error_text(self) -> str:
        """The first errors of the compiler, without the command lines around them."""
        spoken = [line for line in self.lines if not line.startswith(("[", "ninja:", "FAILED:")) and "-o " not in line]
        first = next((i for i, line in enumerate(spoken) if "error" in line.lower()), max(0, len(spoken) - ERROR_LINES))
        return "\n".join(f"  {line[:300]}" for line in spoken[first : first + ERROR_LINES])


def _end(process: "subprocess.Popen[str]") -> None:
    """End ninja and the compilers it started, if they still run."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (OSError, AttributeError):
            process.kill()
        process.wait()
