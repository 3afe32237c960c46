"""What would be built: the sources, their flags, the ninja file, and the key that names the result. Runs nothing."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ext.toolchain import TORCH_TARGET, Compiler, TorchFiles, is_x86_64, machine

LIBRARY = "exl.so"
BINDINGS = "bindings.cpp"
SOURCE_FOLDERS = ("binding", "cpu")
HEADER_FOLDERS = ("binding", "common", "cpu")

# Never -Ofast, -ffast-math or -march=native. The first two make every library that loads beside us flush subnormal
# numbers to zero; the last makes a cached file that dies on another CPU. Contraction is off so that results do not
# depend on the instruction set: where a fused multiply-add is wanted, the kernel says so. (-Wno-psabi: gcc notes that
# wide vectors are passed differently without AVX; ours never cross a translation unit.)
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
)
LINK_FLAGS = ("-shared", "-pthread", "-Wl,--as-needed")
TORCH_LIBRARIES = ("-ltorch_cpu", "-lc10")  # found at run time by name, since torch is already in the process

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISA_FLAGS = {  # by the last word of the file name
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "avxvnni": (*_AVX2, "-mavxvnni"),
}
# The first major release of each compiler that has the flag, for those that some systems in use are older than.
SINCE = {"avxvnni": {"gcc": 11, "clang": 12}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One build: equal keys mean equal results."""

    key: str
    root: Path
    sources: tuple[Path, ...]  # relative to root
    compiler: Compiler
    torch: TorchFiles


def isa_of(source: Path) -> str | None:
    """The instruction set a file asks for by its name: linear_avx2.cpp -> "avx2"; None for the baseline."""
    last = source.stem.rsplit("_", 1)[-1]
    return last if last in ISA_FLAGS else None


def has_isa(compiler: Compiler, isa: str | None) -> bool:
    """Whether the compiler takes the flags of an instruction set. Unknown versions take no new ones."""
    if isa not in SINCE:
        return True
    version = re.search(r"(\d+)\.\d+\.\d+", compiler.version)
    kind = "clang" if "clang" in compiler.version.lower() else "gcc"
    return version is not None and int(version[1]) >= SINCE[isa][kind]


def make_plan(root: Path, compiler: Compiler, torch: TorchFiles) -> Plan:
    """Look at every source and header under `root`. Reads files, starts no process."""
    sources, digest = [], hashlib.sha256()
    release = ".".join(torch.version.split(".")[:2])  # inline code of its headers becomes part of the binary
    for fact in (machine(), compiler.identity, TORCH_TARGET, release, *COMMON_FLAGS, *LINK_FLAGS, *TORCH_LIBRARIES):
        digest.update(f"{fact}\0".encode())
    digest.update(repr(sorted(ISA_FLAGS.items())).encode())
    for folder in HEADER_FOLDERS:
        for file in sorted((root / folder).glob("*")):
            if file.suffix not in (".cpp", ".h"):
                continue
            relative = file.relative_to(root)
            content = file.read_bytes()
            digest.update(f"{relative.as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
            wanted = isa_of(file) is None or (is_x86_64() and has_isa(compiler, isa_of(file)))
            if file.suffix == ".cpp" and folder in SOURCE_FOLDERS and wanted:
                sources.append(relative)
    return Plan(key=digest.hexdigest()[:20], root=root, sources=tuple(sources), compiler=compiler, torch=torch)


def ninja_file(plan: Plan) -> str:
    """The text of build.ninja, to be run in a folder with `binding_unit` as BINDINGS; it leaves LIBRARY there."""
    x86 = is_x86_64()
    flags = [*COMMON_FLAGS, f"-DEXL_X86_ISA={int(x86)}"]
    flags.append(f"-DEXL_AVXVNNI={int(x86 and has_isa(plan.compiler, 'avxvnni'))}")
    libraries = f"-L{_quote(plan.torch.lib)} {' '.join(TORCH_LIBRARIES)}"
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {_quote(plan.compiler.path)}",
        f"flags = {' '.join(flags)}",
        f"torch = -DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {_quote(plan.torch.include)}",
        "rule compile",
        "  command = $cxx $flags $extra -c $in -o $out",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx {' '.join(LINK_FLAGS)} $in -o $out {libraries}",
        "  description = link $out",
    ]
    lines += [f"build bindings.o: compile {BINDINGS}", "  extra = $torch"]
    objects = [(False, "bindings.o")]  # whether for an instruction set: those last, so that the linker prefers baseline
    kernels = [source for source in plan.sources if source.parts[0] != "binding"]
    weight = {source: source_weight(plan.root / source, set()) for source in kernels}
    for source in sorted(kernels, key=weight.__getitem__, reverse=True):  # slowest first, or the last one runs alone
        target = f"{source.stem}.kernel.o"
        objects.append((isa_of(source) is not None, target))
        extra = " ".join(ISA_FLAGS.get(isa_of(source) or "", ()))
        lines += [f"build {target}: compile {_escape(str(plan.root / source))}", f"  extra = {extra}"]
    lines += [f"build {LIBRARY}: link {' '.join(name for _, name in sorted(objects))}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def binding_unit(plan: Plan) -> str:
    """All bindings as one translation unit: torch's headers cost a second each time they are read."""
    files = (plan.root / source for source in plan.sources if source.parts[0] == "binding")
    return "".join(f'#include "{file.as_posix()}"\n' for file in files)


def source_weight(source: Path, seen: set[Path]) -> int:
    """Bytes of a source and of our own headers below it: a stand-in for compile time."""
    if source in seen or not source.is_file():
        return 0
    seen.add(source)
    text = source.read_text(encoding="utf-8", errors="replace")
    included = (source.parent / name for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE))
    return len(text) + sum(source_weight(Path(os.path.normpath(i)), seen) for i in included)


def _escape(text: str) -> str:
    """A path in a ninja file."""
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quote(path: Path | str) -> str:
    """A path inside a command line of a ninja file."""
    return "'" + str(path).replace("$", "$$").replace("'", "'\\''") + "'"
