"""Every kernel compiles with nvcc for the cards we mean, without spilling registers and within its budget.

The emulation never sees inline PTX; this does. No card is needed, only nvcc. Answers are kept in the build cache under
a name made of the source, our headers below it, nvcc and its flags, so that a second run compiles nothing.

A kernel may use 128 registers; one that is meant to use more says so in its file: `// registers: NAME 168`.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cuda_programs as programs
import pytest
from kept import kept

from exl_runtime.errors import BackendUnavailable
from ext.build import Settings
from ext.cuda_plan import NVCC_FLAGS, kernel_sources
from ext.cuda_tools import Nvcc, find_nvcc, places

# One front end for each group, since that is half of the time; 90 is the first with programmatic dependent launch.
GROUPS = {80: (80, 86, 89), 90: (90, 120)}
ARCHITECTURES = tuple(number for group in GROUPS.values() for number in group)
BUDGET = 128
SOURCES = [*kernel_sources(programs.EXT), *sorted((Path(__file__).resolve().parent / "native").glob("*.cu"))]
HOST_ONLY = {"misuse.cu"}  # calls the emulation


def build_ahead() -> list[Callable[[], object]]:
    found = usable_nvcc()
    return [partial(resources, found, source) for source in SOURCES if source.name not in HOST_ONLY]


@pytest.fixture(scope="module")
def nvcc() -> Nvcc:
    return usable_nvcc()


def usable_nvcc() -> Nvcc:
    settings = Settings.from_environment()
    for release in ("13.0", "12.8"):
        try:
            found = find_nvcc(release, settings.cuda_home, settings.open_cache() / "nvcc.json")
        except BackendUnavailable:
            continue
        if set(ARCHITECTURES) <= set(found.targets):
            return found
    pytest.skip(f"no nvcc that knows all of {ARCHITECTURES} among {list(places(settings.cuda_home))}")


@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_no_spills_and_within_budget(source: Path, nvcc: Nvcc) -> None:
    if source.name in HOST_ONLY:
        pytest.skip("for the emulation only")
    budgets = dict(re.findall(r"^// registers: (\w+) (\d+)$", source.read_text(encoding="utf-8"), re.MULTILINE))
    kernels = resources(nvcc, source)
    assert len({k["arch"] for k in kernels}) == len(ARCHITECTURES) or not kernels
    problems = []
    for kernel in kernels:
        # a mangled name holds each identifier behind its length
        named = [n for name, n in budgets.items() if f"{len(name)}{name}" in kernel["name"]]
        budget = int(named[0]) if named else BUDGET
        if kernel["spills"]:
            problems.append(f"{kernel['name']} for {kernel['arch']} spills {kernel['spills']} bytes")
        if kernel["registers"] > budget:
            problems.append(f"{kernel['name']} for {kernel['arch']}: {kernel['registers']} registers, {budget} allowed")
    assert not problems, "\n".join(problems)


def resources(nvcc: Nvcc, source: Path) -> list[dict]:
    """name, arch, registers, spills (bytes stored and loaded), stack (bytes) of every kernel, from -Xptxas -v."""
    flags = [*NVCC_FLAGS, "-Xptxas", "-v", "-fatbin"]
    for portable, group in GROUPS.items():
        flags += ["-gencode", f"arch=compute_{portable},code=[{','.join(f'sm_{number}' for number in group)}]"]
    folder = Settings.from_environment().open_cache() / "emulated" / "resources"
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / f"{source.stem}-{programs.key_of(source, (nvcc.identity, *flags))}.json"

    def compile(beside: Path) -> None:
        command = [nvcc.path, *flags, "--threads", str(min(len(ARCHITECTURES), os.cpu_count() or 1))]
        done = subprocess.run([*command, str(source), "-o", str(beside)], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{source.name} does not compile with nvcc\n{done.stderr[:6000]}"
        beside.write_text(json.dumps(parse(done.stderr)))

    return json.loads(kept(known, compile).read_text())


def parse(text: str) -> list[dict]:
    """The kernels in what ptxas says."""
    found: list[dict] = []
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            found.append({"name": entry[1], "arch": entry[2], "registers": 0, "spills": 0, "stack": 0})
        elif (
            spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ) and (found):
            found[-1]["spills"] += int(spill[2]) + int(spill[3])
            found[-1]["stack"] += int(spill[1])
        elif (used := re.search(r"Used (\d+) registers", line)) and found:
            found[-1]["registers"] = int(used[1])
    return found


def test_what_ptxas_says_is_understood() -> None:
    text = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_86'
ptxas info    : Function properties for _Z1kPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 368 bytes cmem[0]"""
    assert parse(text) == [{"name": "_Z1kPf", "arch": "sm_86", "registers": 255, "spills": 12, "stack": 16}]


def test_a_spill_is_noticed(nvcc: Nvcc, tmp_path: Path) -> None:
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) hungry(float* p) {\n"
        "  float a[96];\n#pragma unroll\n  for (int i = 0; i < 96; ++i) a[i] = p[i * 32 + threadIdx.x];\n"
        "  __syncthreads();\n#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) p[i * 32 + threadIdx.x] = a[95 - i] * a[i] + a[(i * 7) % 96];\n}\n"
    )
    assert all(kernel["spills"] > 0 for kernel in resources(nvcc, source))
