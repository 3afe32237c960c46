"""Finds a CUDA compiler that fits the installed torch. Builds nothing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from exl_runtime.errors import BackendUnavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvcc:
    """A CUDA compiler. `identity` changes whenever the program behind `path` does."""

    path: str
    release: str  # "13.0"
    targets: tuple[int, ...]  # virtual architectures it knows, ascending: 80 is compute_80
    root: str  # the folder of its toolkit, with bin, include and lib or lib64 in it
    identity: str

    @property
    def major(self) -> int:
        """13 of 13.0: what has to agree with torch."""
        return int(self.release.split(".")[0])


def places(cuda_home: str | None) -> Iterator[str]:
    """Where an nvcc may be, in the order of preference: CUDA_HOME, PATH, torch's pip packages, the usual folders."""
    if cuda_home:
        yield str(Path(cuda_home) / "bin" / "nvcc")
    if (on_path := shutil.which("nvcc")) is not None:
        yield on_path
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        yield from sorted(map(str, Path(folder).glob("cu*/bin/nvcc")), reverse=True)
    yield "/usr/local/cuda/bin/nvcc"
    yield from sorted(map(str, Path("/usr/local").glob("cuda-*/bin/nvcc")), reverse=True)


def find_nvcc(
    torch_cuda: str, cuda_home: str | None = None, memo: Path | None = None, *, among: Iterable[str] | None = None
) -> Nvcc:
    """The first nvcc whose major version is that of `torch_cuda` ("13.0", what torch was built for).

    `memo`, a JSON file, keeps the answers of compilers asked before. Raises BackendUnavailable, saying what to install.
    """
    wanted = int(torch_cuda.split(".")[0])
    install = _how_to_install(torch_cuda)
    others: dict[str, str] = {}
    for path in dict.fromkeys(places(cuda_home) if among is None else among):
        if not os.access(path, os.X_OK):
            continue
        nvcc = _ask(path, memo)
        if nvcc is not None and nvcc.major == wanted:
            return nvcc
        others[path] = "does not answer" if nvcc is None else f"CUDA {nvcc.release}"
    if others:
        seen = ", ".join(f"{path} ({what})" for path, what in others.items())
        raise BackendUnavailable(
            f"torch was built for CUDA {torch_cuda}, but the CUDA compilers here are others: {seen}",
            hint=f"{install}, and name its folder in CUDA_HOME",
        )
    raise BackendUnavailable("no CUDA compiler (nvcc) found in CUDA_HOME, on PATH or in /usr/local/cuda", hint=install)


def _how_to_install(torch_cuda: str) -> str:
    """A command where there is one: from CUDA 13 on, the whole compiler is on PyPI. Its parts do not pin each other."""
    major = int(torch_cuda.split(".")[0])
    toolkit = f"install the CUDA {major} toolkit"
    if major < 13:
        return toolkit
    parts = " ".join(f"'nvidia-{part}=={torch_cuda}.*'" for part in ("cuda-nvcc", "cuda-crt", "nvvm"))
    return f"{sys.executable} -m pip install {parts} 'nvidia-cuda-cccl=={major}.*', or {toolkit}"


def _ask(path: str, memo: Path | None) -> Nvcc | None:
    """What an nvcc says about itself, from the memo if it was asked before; None if it does not run."""
    state = os.stat(real := os.path.realpath(path))
    stamp = f"{path}|{real}|{state.st_size}|{state.st_mtime_ns}"
    known = _read(memo)
    if stamp in known:
        return known[stamp]
    version = _output([path, "--version"])
    release = re.search(r"release (\d+\.\d+)", version or "")
    if release is None:
        return None
    targets = tuple(sorted({int(t) for t in re.findall(r"compute_(\d+)\b", _output([path, "--list-gpu-arch"]) or "")}))
    # Where it really lives: `path` may be a script that calls another.
    top = re.search(r"^#\$ TOP=(.*)$", _output([path, "--dryrun", "-E", "-x", "cu", os.devnull]) or "", re.MULTILINE)
    root = os.path.realpath(top.group(1).strip() if top is not None else Path(real).parents[1])
    nvcc = Nvcc(path=path, release=release.group(1), targets=targets, root=root, identity=f"{stamp}|{release.group(1)}")
    _write(memo, [*known.values(), nvcc])
    return nvcc


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout + done.stderr
    except (OSError, subprocess.SubprocessError):
        return None


def _read(memo: Path | None) -> dict[str, Nvcc]:
    """Earlier answers by the stamp of the program."""
    if memo is None:
        return {}
    try:
        entries = [Nvcc(**{**entry, "targets": tuple(entry["targets"])}) for entry in json.loads(memo.read_text())]
        return {entry.identity.rsplit("|", 1)[0]: entry for entry in entries}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(memo: Path | None, entries: list[Nvcc]) -> None:
    if memo is None:
        return
    beside = memo.with_name(f"{memo.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps([asdict(entry) for entry in entries[-8:]]), encoding="utf-8")
        os.replace(beside, memo)
    except OSError:
        return  # only a saved question: the next start asks again
