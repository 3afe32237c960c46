"""The CUDA kernels' libraries: sources, flags, ninja files, keys. Runs nothing.

Two libraries out of the same files. exl_cuda.so, for machines with a card: kernels by nvcc for the architectures of the
cards that are there, bindings by the C++ compiler. exl_cuda_emulated.so, for tests: everything by the C++ compiler, the
kernels run on the CPU (ext/emulation).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ext.plan import BINDINGS, COMMON_FLAGS, LINK_FLAGS, TORCH_LIBRARIES
from ext.recipe import NINJA, Recipe
from ext.toolchain import TORCH_TARGET, Compiler, TorchFiles, machine

EMULATED_LIBRARY = "exl_cuda_emulated.so"
HEADER_FOLDERS = ("binding", "binding/cuda", "common", "cuda", "emulation")

# As for the CPU kernels, with less optimisation: tests compile these files more often than they run them. The kernels
# are written for nvcc, which has no opinion on unused parameters of two-faced code.
EMULATED_FLAGS = (
    *(flag for flag in COMMON_FLAGS if flag != "-O3"),
    *("-O2", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-variable", "-Wno-unused-but-set-variable"),
    "-DEXL_EMULATED=1",
)


def kernel_sources(root: Path) -> list[Path]:
    """The .cu files, by name."""
    return sorted((root / "cuda").glob("*.cu"))


def emulated_recipe(root: Path, compiler: Compiler, torch: TorchFiles) -> Recipe:
    """How to build the library that runs the CUDA kernels on the CPU."""
    facts = (machine(), compiler.identity, TORCH_TARGET, *EMULATED_FLAGS, *LINK_FLAGS, *TORCH_LIBRARIES)
    bindings = [*sorted((root / "emulation").glob("binding*.cpp")), *sorted((root / "binding" / "cuda").glob("*.cpp"))]
    runtime = [file for file in sorted((root / "emulation").glob("*.cpp")) if file not in bindings]
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {quote(compiler.path)}",
        f"flags = {' '.join(EMULATED_FLAGS)}",
        f"torch = -DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {quote(torch.include)}",
        "rule compile",
        "  command = $cxx $flags $extra -c -x c++ $in -o $out",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx {' '.join(LINK_FLAGS)} $in -o $out -L{quote(torch.lib)} {' '.join(TORCH_LIBRARIES)}",
        "  description = link $out",
        f"build bindings.o: compile {BINDINGS}",
        "  extra = $torch",
    ]
    objects = ["bindings.o"]
    for source in [*kernel_sources(root), *runtime]:
        objects.append(f"{source.stem}.{source.suffix[1:]}.o")
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
    lines += [f"build {EMULATED_LIBRARY}: link {' '.join(objects)}", f"default {EMULATED_LIBRARY}", ""]
    return Recipe(
        key=source_key(root, torch, facts),
        library=EMULATED_LIBRARY,
        title="emulated CUDA kernels",
        files={NINJA: "\n".join(lines), BINDINGS: include_all(bindings)},
        compiler=f"{compiler.path} ({compiler.version})",
        torch=torch.version,
    )


def source_key(root: Path, torch: TorchFiles, facts: Iterable[str]) -> str:
    """A name for the build of everything that lies under `root` now with these `facts` (flags, tools)."""
    digest = hashlib.sha256()
    for fact in (".".join(torch.version.split(".")[:2]), *facts):
        digest.update(f"{fact}\0".encode())
    for folder in HEADER_FOLDERS:
        for file in sorted((root / folder).glob("*")):
            if file.suffix not in (".cpp", ".h", ".cu", ".cuh"):
                continue
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:20]


def include_all(files: Iterable[Path]) -> str:
    """One translation unit of many: torch's headers cost a second each time they are read."""
    return "".join(f'#include "{file.as_posix()}"\n' for file in files)


def escape(path: Path) -> str:
    """A path in a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(path: Path | str) -> str:
    """A path inside a command line of a ninja file."""
    return "'" + str(path).replace("$", "$$").replace("'", "'\\''") + "'"
