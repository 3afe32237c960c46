"""Mistakes put into a kernel on purpose: what the emulation is there to notice, and in which mode it does.

Plain alone would miss five of them; that is why kernels also run under both sanitizers (test_sanitizers.py).
"""

import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cuda_programs as programs
import pytest

from ext.toolchain import find_compiler

NATIVE = Path(__file__).resolve().parent / "native"
RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"

NOTICED = [  # bug (planted.h), mode, what the program has to say
    ("NoBarrierAfterStaging", 1, "tsan", RACE),
    ("NoWaitForCopies", 2, "plain", "cp.async copies never waited for"),
    ("WrongHalfOfK", 3, "plain", "WRONG"),
    ("RingIndexOffByOne", 4, "plain", "wrote outside a shared array"),
    ("RingIndexOffByOne", 4, "asan", OVERFLOW),
    ("RingIndexOffByOne", 4, "tsan", RACE),
    ("OneTileTooMany", 5, "plain", "cp.async copies never waited for"),
    ("NoSyncwarpAroundRing", 6, "plain", "WRONG"),
    ("NoSyncwarpAroundRing", 6, "tsan", RACE),
    ("NoBarrierBeforeReduction", 7, "tsan", RACE),
    ("BarrierInBranch", 8, "plain", "divergent __syncthreads: thread 0 is at planted.cu"),
    ("ScaleOfNeighbour", 9, "plain", "WRONG"),
    ("WarpReturnsEarly", 10, "plain", "thread exits while others wait at __syncthreads"),
    ("NoFenceBeforeTicket", 11, "tsan", RACE),
    ("NoTailGuard", 12, "asan", OVERFLOW),
    ("OneGroupTooFew", 14, "plain", "cp.async copies never waited for"),
    ("NoRowGuard", 15, "asan", OVERFLOW),
    ("NoBarrierBeforeTicket", 16, "tsan", RACE),
    ("NoFenceAfterTicket", 17, "tsan", RACE),
    ("TicketNotPutBack", 18, "plain", "WRONG"),
    ("TooLittleSharedMemory", 19, "plain", "wrote outside a shared array"),
    ("TooLittleSharedMemory", 19, "asan", OVERFLOW),
]
ORDERS = {"plain": "6", "portable": "2", "asan": "2", "tsan": "1"}


def program(mode: str) -> Path:
    return programs.program(NATIVE / "planted.cpp", mode, kernels=(NATIVE / "planted.cu",))


def build_ahead() -> list[Callable[[], object]]:
    return [partial(program, mode) for mode in ORDERS]


def planted(mode: str, bug: int) -> "subprocess.CompletedProcess[str]":
    return programs.run(program(mode), ORDERS[mode], str(bug))


@pytest.mark.parametrize("mode", list(ORDERS))
def test_a_correct_kernel_passes(mode: str) -> None:
    done = planted(mode, 0)
    assert done.returncode == 0 and "PASS" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "bug", "mode", "says"), NOTICED, ids=[f"{n[0]}-{n[2]}" for n in NOTICED])
def test_every_planted_bug_is_noticed(name: str, bug: int, mode: str, says: str) -> None:
    assert f"k{name} = {bug}," in (NATIVE / "planted.h").read_text()
    done = planted(mode, bug)
    assert done.returncode != 0 and says in done.stdout + done.stderr, done.stdout + done.stderr


MISUSE = [
    "deadlock: 24 at __syncthreads, 8 in a warp operation, 32 exited",
    "in the mask has exited",
    "divergent warp operation: other lanes are at misuse.cu",
    "deadlock: 0 at __syncthreads, 16 in a warp operation, 48 exited",
    "too much shared memory",
    "the calling lane is not in its mask",
    "overlapping masks, other lanes are at misuse.cu",
    "cp.async: address not aligned to its size",
    "mma or ldmatrix in a partial warp",
    "ldmatrix: row address not aligned to 16 bytes",
    "bad block size",
    "too much dynamic shared memory",
]


def test_misuse_is_named_with_its_place() -> None:
    target = programs.program(NATIVE / "misuse.cu", "plain", kernels=())
    done = programs.run(target)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.split("\n@ ")[1:]
    assert len(said) == len(MISUSE), done.stdout
    for wanted, got in zip(MISUSE, said, strict=True):
        assert wanted in got, f"wanted {wanted!r}, got {got!r}"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("__global__ void k(float* p) { atomicAdd(p, 1.0f); }", "must not depend on the order of arrival"),
        ("__global__ void k(double* p) { atomicAdd(p, 1.0); }", "must not depend on the order of arrival"),
        ("__global__ void k() { __shared__ float s[32]; }", "use EXL_SHARED"),
    ],
)
def test_what_kernels_may_not_do_does_not_compile(code: str, says: str, tmp_path: Path) -> None:
    source = tmp_path / "refused.cpp"
    source.write_text(f'#include "{programs.EXT / "cuda" / "ptx.h"}"\n{code}\nvoid use() {{ (void)k; }}\n')
    done = subprocess.run(
        [find_compiler(None).path, "-std=c++17", "-fsyntax-only", str(source)], capture_output=True, text=True
    )
    assert done.returncode != 0 and says in done.stderr, done.stderr


def test_only_ptx_h_has_assembly() -> None:
    for path in sorted((programs.EXT / "cuda").glob("*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            code = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
            assert path.name == "ptx.h" or not re.search(r"\basm\b", code), path.name
