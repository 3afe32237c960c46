"""Builds the programs of tests/native_checks with all CPU kernels under a sanitizer of the compiler.

A sanitizer must be in a process from its start, so it cannot look at a library that Python loads. Objects are kept in
the cache of built libraries by their content: a changed kernel is compiled again, the others are not.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kept import kept, sweep

from ext.build import Settings, plan_for
from ext.plan import ISA_FLAGS, Plan, isa_of, ninja_file
from ext.toolchain import parallel_jobs

CHECKS = Path(__file__).resolve().parent / "native_checks"
# -O1 keeps the kernels fast enough; contraction is off as in the real build, or products would have other bits.
BASE = ("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-Wno-psabi", "-fno-omit-frame-pointer")


@dataclass(frozen=True, slots=True)
class Sanitizer:
    """`flags` are for all files. `light` are added where an instruction set makes files slow to compile: checks that
    vectors passed by reference would need at every step, and that no program here depends on."""

    name: str
    flags: tuple[str, ...]
    light: tuple[str, ...]
    options: dict[str, str]


ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize-address-use-after-scope"),
    ("-fno-sanitize=null,alignment,object-size",),
    {"ASAN_OPTIONS": "abort_on_error=0:detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
)
THREAD = Sanitizer("thread", ("-fsanitize=thread",), (), {"TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0"})


# The feature, as Linux names it, without which a file of an instruction set never runs.
CPU_FLAGS = {
    "avx2": "avx2",
    "avx512": "avx512f",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avxvnni": "avx_vnni",
}


class Unavailable(Exception):
    """Why a sanitizer cannot be used here."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where programs are built, and how they are started."""

    plan: Plan  # of the library that programs use: its kernels, compiler and definitions
    sanitizer: Sanitizer
    folder: Path
    cpu: frozenset[str]  # names of the CPU's features
    prefix: tuple[str, ...] = ()

    def build(self, source: Path) -> Path:
        """The program made of one file with a main function and all kernels."""
        sources = [source, *self._kernels()]
        with ThreadPoolExecutor(parallel_jobs()) as pool:
            list(pool.map(self._compile, _slowest_first(sources)))
        objects = [self._object(each) for each in sources]
        target = self.folder / f"{source.stem}-{_digest([o.name.encode() for o in objects])}"
        return self._run([*self.sanitizer.flags, "-pthread", *map(str, objects)], target)

    def start(self, program: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end."""
        return subprocess.run(
            [*self.prefix, str(program), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
            env={**os.environ, **self.sanitizer.options},
        )

    def steps(self, sources: list[Path]) -> list[Callable[[], Path]]:
        """Builds of the programs' objects, then of the programs: what to do ahead of `build`."""
        objects = [partial(self._compile, source) for source in _slowest_first([*self._kernels(), *sources])]
        return [*objects, *(partial(self.build, source) for source in sources)]

    def _kernels(self) -> list[Path]:
        return [ROOT / file for file in self.plan.sources if file.parts[0] == "cpu"]

    def _compile(self, source: Path) -> Path:
        return self._run(self._flags(source), self._object(source))

    def _flags(self, source: Path) -> list[str]:
        isa = isa_of(source)
        watched = (*self.sanitizer.flags, *(self.sanitizer.light if isa else ()))
        if isa in CPU_FLAGS and CPU_FLAGS[isa] not in self.cpu:
            watched = ()  # it is only linked here, never run, and takes long to compile
        here = (f"-I{ROOT}", f"-I{CHECKS}", *re.findall(r"(?<= )-DEXL_\S+", ninja_file(self.plan)))
        return [*BASE, *watched, *ISA_FLAGS.get(isa or "", ()), *here, "-c", str(source)]

    def _object(self, source: Path) -> Path:
        flags = " ".join(flag for flag in self._flags(source) if not flag.startswith(("-I", "/")))
        content = [file.read_bytes() for file in sorted(_closure(source, set()))]
        key = _digest([self.plan.compiler.identity.encode(), flags.encode(), *content])
        return self.folder / f"{source.stem}-{key}.o"

    def _run(self, arguments: list[str], target: Path) -> Path:
        """What the compiler makes of them."""

        def call(beside: Path) -> None:
            command = [self.plan.compiler.path, *arguments, "-o", str(beside)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

        return kept(target, call)


ROOT = Settings().root


def _slowest_first(sources: list[Path]) -> list[Path]:
    """So that no long one runs alone at the end."""
    return sorted(sources, key=lambda source: (isa_of(source) is None, -source.stat().st_size))


def open_bench(sanitizer: Sanitizer) -> Bench:
    """Raises Unavailable, saying what is missing: the compiler's part of a sanitizer, or what it asks of the system."""
    settings = Settings.from_environment()
    plan = plan_for(settings)
    folder = settings.open_cache() / "sanitized"
    folder.mkdir(exist_ok=True)
    sweep(folder)
    text = "int main() { return 0; }\n"
    source = kept(folder / "probe.cpp", lambda path: path.write_text(text, encoding="utf-8"))
    program = folder / f"probe-{sanitizer.name}-{_digest([plan.compiler.identity.encode()])}"
    known = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    cpu = frozenset(known[1].split() if known else ())
    bench = Bench(plan, sanitizer, folder, cpu)
    try:
        bench._run([*sanitizer.flags, str(source)], program)
    except RuntimeError as err:
        said = str(err).splitlines()[-1]
        raise Unavailable(f"{plan.compiler.path} has no {sanitizer.name} sanitizer: {said}") from err
    # With many random bits in addresses some thread sanitizers find their own memory taken.
    for prefix in ((), ("setarch", "-R")):
        bench = Bench(plan, sanitizer, folder, cpu, prefix)
        try:
            done = bench.start(program)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return bench
    reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
    raise Unavailable(f"programs with the {sanitizer.name} sanitizer do not start here: {reason}")


def _closure(source: Path, seen: set[Path]) -> set[Path]:
    """The source and our own headers below it."""
    if source not in seen and source.is_file():
        seen.add(source)
        for name in re.findall(r'^#include "([^"]+)"', source.read_text(encoding="utf-8"), re.MULTILINE):
            for folder in (source.parent, ROOT):
                _closure(Path(os.path.normpath(folder / name)), seen)
    return seen


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\0".encode())
        digest.update(part)
    return digest.hexdigest()[:20]
