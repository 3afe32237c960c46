"""The choice of instruction set, and the one way in which code for a wide one could leak into all of the library."""

import shutil
import subprocess
from pathlib import Path

import pytest

from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops import native
from ext.plan import COMMON_FLAGS, ISA_FLAGS, isa_of
from ext.toolchain import find_compiler, is_x86_64

EXT = Path(__file__).resolve().parents[2] / "ext"
SUFFIXED = [path for path in sorted((EXT / "cpu").glob("*.cpp")) if isa_of(path)]


def test_the_instruction_set_can_be_lowered_and_lifted() -> None:
    try:
        native.ensure_loaded()
    except BackendUnavailable as err:
        pytest.skip(str(err))
    set_isa = native.ops().set_isa
    best = set_isa("best")
    assert set_isa("portable") == "portable" == set_isa("")
    assert set_isa("best") == best
    with pytest.raises(RuntimeError, match="unknown instruction set 'sse9'"):
        set_isa("sse9")
    assert set_isa("") == best


def weak_code(objects: str) -> list[str]:
    """Functions of an object file that the linker merges with others of the same name."""
    text = subprocess.run(["nm", "-C", "--defined-only", objects], capture_output=True, text=True, check=True).stdout
    return [line.split(" ", 2)[2] for line in text.splitlines() if line.split(" ", 2)[1] in "WwVvu"]


@pytest.mark.skipif(not is_x86_64() or shutil.which("nm") is None, reason="needs x86-64 and nm")
@pytest.mark.parametrize("source", SUFFIXED, ids=lambda path: path.name)
def test_files_of_an_instruction_set_define_no_shared_functions(source: Path, tmp_path: Path) -> None:
    """A template or inline function with external linkage would be kept once, perhaps in its AVX-512 form."""
    target = tmp_path / "object.o"
    flags = [*COMMON_FLAGS, "-DEXL_X86_ISA=1", *ISA_FLAGS[isa_of(source) or ""]]
    flags[flags.index("-O3")] = "-O1"  # quicker, and it keeps more functions
    subprocess.run([find_compiler(None).path, *flags, "-c", str(source), "-o", str(target)], check=True)
    assert weak_code(str(target)) == []


@pytest.mark.skipif(not is_x86_64(), reason="needs x86-64")
def test_avx_vnni_equals_portable(tmp_path: Path) -> None:
    """On processors without it, in the form of AVX-512VL: the same source but for the name of one intrinsic."""
    compiler, cpu = find_compiler(None).path, EXT / "cpu"
    stand_in = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
    base = [compiler, *COMMON_FLAGS, "-DEXL_X86_ISA=0", f"-I{EXT}"]
    base[base.index("-O3")] = "-O1"  # quicker
    kernel, program = tmp_path / "kernel.o", tmp_path / "packed_check"
    subprocess.run([*base, *stand_in, "-c", str(cpu / "linear_packed_avxvnni.cpp"), "-o", str(kernel)], check=True)
    sources = ["linear_packed_portable.cpp", "tiles.cpp", "tiles_portable.cpp", "threads.cpp", "isa.cpp"]
    check = Path(__file__).parent / "packed_check.cpp"
    parts = [str(check), *(str(cpu / name) for name in sources), str(kernel)]
    subprocess.run([*base, *parts, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("this processor has AVX-VNNI in neither form")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not is_x86_64() or shutil.which("nm") is None, reason="needs x86-64 and nm")
def test_that_check_can_fail(tmp_path: Path) -> None:
    source, target = tmp_path / "bad.cpp", tmp_path / "bad.o"
    source.write_text("#include <vector>\nvoid grow(std::vector<float>& v) { v.push_back(1.0f); }\n")
    subprocess.run([find_compiler(None).path, "-O1", "-c", str(source), "-o", str(target)], check=True)
    assert any("vector" in name for name in weak_code(str(target)))
