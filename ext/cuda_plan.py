"""The CUDA kernels' libraries: sources, flags, ninja files, keys. Runs nothing.

Two libraries out of the same files. exl_cuda.so, for machines with a card: kernels by nvcc for the architectures of the
cards that are there, bindings by the C++ compiler. exl_cuda_emulated.so, for tests: everything by the C++ compiler, the
kernels run on the CPU (ext/emulation).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ext.cuda_tools import Nvcc
from ext.plan import BINDINGS, COMMON_FLAGS, LINK_FLAGS, TORCH_LIBRARIES, source_weight
from ext.recipe import NINJA, Recipe
from ext.toolchain import TORCH_TARGET, Compiler, TorchFiles, machine

LIBRARY = "exl_cuda.so"
EMULATED_LIBRARY = "exl_cuda_emulated.so"
HEADER_FOLDERS = ("binding", "binding/cuda", "common", "cuda", "emulation")
OLDEST = 80  # compute capability 8.0, Ampere: the first with cp.async and bfloat16

# Multiply-adds are fused where nvcc likes: kernels that need equal bits write fmaf out. Never --use_fast_math, which
# flushes subnormal numbers: EXL2 scales are often subnormal.
NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")

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


def architectures(capabilities: Iterable[tuple[int, int]], nvcc: Nvcc) -> tuple[str, ...]:
    """nvcc's -gencode arguments for cards of these compute capabilities: machine code for each.

    For a card that is newer than nvcc, portable code of the newest kind it knows, which the driver finishes.
    """
    found = []
    for number in sorted({10 * major + minor for major, minor in capabilities}):
        if number in nvcc.targets:
            found.append(f"arch=compute_{number},code=sm_{number}")
            continue
        older = [target for target in nvcc.targets if target < number]
        if older:
            found.append(f"arch=compute_{older[-1]},code=compute_{older[-1]}")
    return tuple(dict.fromkeys(found))


def cuda_recipe(
    root: Path, compiler: Compiler, torch: TorchFiles, nvcc: Nvcc, capabilities: Iterable[tuple[int, int]]
) -> Recipe:
    """How to build the CUDA kernels for cards of these compute capabilities."""
    generate = [f"-gencode {target}" for target in architectures(capabilities, nvcc)]
    libraries = [*TORCH_LIBRARIES, *(["-ltorch_cuda"] if (torch.lib / "libtorch_cuda.so").exists() else [])]
    facts = (machine(), compiler.identity, nvcc.identity, TORCH_TARGET)
    flags = (*NVCC_FLAGS, *generate, *COMMON_FLAGS, *LINK_FLAGS, *libraries)
    bindings = sorted((root / "binding" / "cuda").glob("*.cpp"))
    lines = [
        "ninja_required_version = 1.8",
        f"nvcc = {quote(nvcc.path)} -ccbin {quote(compiler.path)}",
        f"cxx = {quote(compiler.path)}",
        "rule compile",
        f"  command = $cxx {' '.join(COMMON_FLAGS)} -DTORCH_TARGET_VERSION={TORCH_TARGET} "
        f"-isystem {quote(torch.include)} -c $in -o $out",
        "  description = compile $in",
        "rule kernel",
        f"  command = $nvcc {' '.join((*NVCC_FLAGS, *generate))} -c $in -o $out",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx {' '.join(LINK_FLAGS)} $in -o $out -L{quote(torch.lib)} {' '.join(libraries)} "
        f"{' '.join(_runtime(Path(nvcc.root)))}",
        "  description = link $out",
    ]
    objects = ["bindings.o"]
    for source in _slowest_first(kernel_sources(root)):
        objects.append(f"{source.stem}.cu.o")
        lines.append(f"build {objects[-1]}: kernel {escape(source)}")
    lines += [f"build bindings.o: compile {BINDINGS}"]
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}", ""]
    return Recipe(
        key=source_key(root, torch, (*facts, *flags)),
        output=LIBRARY,
        title="CUDA kernels",
        files={NINJA: "\n".join(lines), BINDINGS: include_all(bindings)},
        compiler=f"{nvcc.path} (CUDA {nvcc.release}) and {compiler.path} ({compiler.version})",
        torch=torch.version,
    )


def _runtime(toolkit: Path) -> list[str]:
    """Linker arguments for the CUDA runtime: the same shared library that torch has loaded, found by its name."""
    for name in ("lib64", "targets/x86_64-linux/lib", "lib"):
        for file in sorted((toolkit / name).glob("libcudart.so*")):
            return [f"-L{quote(toolkit / name)}", f"-l:{file.name}"]
    return ["-lcudart"]


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
    for source in [*_slowest_first(kernel_sources(root)), *runtime]:
        objects.append(f"{source.stem}.{source.suffix[1:]}.o")
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
    lines += [f"build {EMULATED_LIBRARY}: link {' '.join(objects)}", f"default {EMULATED_LIBRARY}", ""]
    return Recipe(
        key=source_key(root, torch, facts),
        output=EMULATED_LIBRARY,
        title="emulated CUDA kernels",
        files={NINJA: "\n".join(lines), BINDINGS: include_all(bindings)},
        compiler=f"{compiler.path} ({compiler.version})",
        torch=torch.version,
    )


def _slowest_first(sources: list[Path]) -> list[Path]:
    """In the order in which to start compilers, so that no long one runs alone at the end."""
    return sorted(sources, key=lambda source: source_weight(source, set()), reverse=True)


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
