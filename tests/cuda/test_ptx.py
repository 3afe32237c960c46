"""Every ptx:: wrapper against vectors and against the text of the PTX ISA, told again in numpy.

The vectors in golden/ptx.txt are what the emulation prints; a card has to print the same. Its first line says whether
one has done so. Renew them with `python tests/cuda/test_ptx.py` (needs no card).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import cuda_programs as programs
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "native" / "ptx_vectors.cu"
GOLDEN = HERE / "golden" / "ptx.txt"
CLOSE = {"approximate"}  # the fast functions of a card are not exact
Vectors = dict[str, np.ndarray]


def parse(text: str) -> Vectors:
    """name -> (32 lanes, 4) uint32."""
    lines = (line.split(": ") for line in text.splitlines() if line and not line.startswith("#"))
    return {
        name: np.array([int(w, 16) for w in words.split()], dtype=np.uint32).reshape(32, 4) for name, words in lines
    }


def emulate(mode: str = "plain") -> str:
    done = programs.run(programs.program(SOURCE, mode, kernels=()))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def golden() -> Vectors:
    return parse(GOLDEN.read_text(encoding="utf-8"))


def compare(got: Vectors, golden: Vectors) -> None:
    assert list(got) == list(golden)
    for name, wanted in golden.items():
        if name in CLOSE:
            a, b = (v.view(np.float32).astype(np.float64) for v in (got[name], wanted))
            # ex2.approx and rsqrt: 2 units in the last place; __expf(x): 2 + 1.2 |x| units, |x| < 6 here
            assert np.all(np.abs(a - b) <= 10 * 2.0**-23 * np.abs(b)), name
        else:
            wrong = np.flatnonzero((got[name] != wanted).any(axis=1))
            assert wrong.size == 0, f"{name}: lanes {wrong.tolist()}"


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_the_emulation_prints_the_vectors(golden: Vectors, mode: str) -> None:
    compare(parse(emulate(mode)), golden)


@pytest.mark.gpu
def test_a_card_prints_the_vectors(golden: Vectors, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    program = tmp_path / "vectors"
    command = [nvcc, "-std=c++17", "-O3", "-arch=native", "-o", str(program), str(SOURCE)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    compare(parse(done.stdout), golden)


# ---- the same from the description alone ----------------------------------------------------------------------------


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """The words of `in`, and the numbers whose halves are packed in `small` and `brain`, as (1024, 2) float."""
    i = np.arange(1024, dtype=np.uint64)
    words = (((i + 1) * 2654435761) ^ (i << 7)).astype(np.uint64) & 0xFFFFFFFF
    n = np.arange(1024)
    numbers = np.stack([(n * 5 % 31 - 15) * 0.5, (n * 11 % 29 - 14) * 0.5], axis=1)
    return words.astype(np.uint32), numbers


@pytest.mark.parametrize("name", ["mma_m16n8k16_f16", "mma_m16n8k16_bf16"])
def test_mma(golden: Vectors, name: str) -> None:
    _, numbers = inputs()
    a, b, c = np.full((16, 16), np.nan), np.full((16, 8), np.nan), np.full((16, 8), np.nan)
    for lane in range(32):
        group, thread = divmod(lane, 4)  # groupID and threadID_in_group of the PTX ISA
        for i in range(8):  # a0..a7: row groupID for i in 0,1,4,5; column + 8 from a4 on
            row = group if i in (0, 1, 4, 5) else group + 8
            a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)] = numbers[4 * lane + i // 2, i % 2]
        for i in range(4):
            b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] = numbers[128 + 2 * lane + i // 2, i % 2]
        for i in range(4):
            c[group + (8 if i >= 2 else 0), thread * 2 + (i & 1)] = (lane * 4 + i) * 0.25
    d = a @ b + c  # exact: multiples of 1/4 far below 2^22
    for lane in range(32):
        group, thread = divmod(lane, 4)
        wanted = [d[group + (8 if i >= 2 else 0), thread * 2 + (i & 1)] for i in range(4)]
        assert golden[name][lane].view(np.float32).tolist() == wanted, lane


@pytest.mark.parametrize(("name", "count"), [("ldmatrix_x4", 4), ("ldmatrix_x2", 2)])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(golden: Vectors, name: str, count: int, trans: bool) -> None:
    words, _ = inputs()
    rows = words[:256].view(np.uint16).reshape(64, 8)
    matrices = [np.stack([rows[(8 * m + r) * 2 % 61] for r in range(8)]) for m in range(count)]
    got = golden[name + ("_trans" if trans else "")]
    for lane in range(32):
        for m, matrix in enumerate(matrices):
            elements = (matrix.T if trans else matrix)[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert got[lane, m] == int(elements[0]) | int(elements[1]) << 16, (lane, m)
        assert not got[lane, count:].any()


def test_movmatrix(golden: Vectors) -> None:
    words, _ = inputs()
    for which in range(2):
        matrix = words[32 * which : 32 * which + 32].view(np.uint16).reshape(8, 8)  # lane (g, t): row g, columns 2t..
        turned = np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint32)
        assert np.array_equal(golden["movmatrix_trans"][:, which], turned)
    assert not golden["movmatrix_trans"][:, 2:].any()


def test_barriers_and_atomics(golden: Vectors) -> None:
    words, _ = inputs()
    x, y = words[:32], words[32:64]
    got = golden["barrier_atomics"]
    assert (got[:, 0] == (x & 1).sum()).all() and (got[:, 1] == 0 + 2 + 4).all()
    assert (got[:, 2] == (x & 255).sum()).all() and (got[:, 3] == (y & 0xFFFF).max() + (4 << 16)).all()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("kind", ["", "_zfill", "_hint"])
def test_cp_async(golden: Vectors, size: int, kind: str) -> None:
    if kind == "_hint" and size != 16:
        return
    words, _ = inputs()
    for lane in range(32):
        before = words[4 * lane : 4 * lane + 4].tobytes()
        source = words[512 + 4 * lane :].tobytes()[:size]
        if kind == "_zfill":
            source = source[: lane % (size + 1)].ljust(size, b"\0")
        wanted = source + before[size:]
        assert golden[f"cp_async{size}{kind}"][lane].tobytes() == wanted, lane


def test_loads(golden: Vectors) -> None:
    words, _ = inputs()
    for name in ("load16_once", "load16_hint"):
        assert np.array_equal(golden[name], words[:128].reshape(32, 4))
    assert np.array_equal(golden["load8_load4_once"][:, :2], words[:64].reshape(32, 2))
    assert np.array_equal(golden["load8_load4_once"][:, 2], words[:32])


def test_bits(golden: Vectors) -> None:
    words, _ = inputs()
    x, y, z = words[:32], words[32:64], words[64:96]
    assert np.array_equal(golden["lop3"][:, 0], x & y | z)
    assert np.array_equal(golden["lop3"][:, 2], x ^ y ^ z)
    tables = [golden["lop3"][:, 1], golden["lop3"][:, 3]]
    for table, got in zip((0x1D, 0x42), tables, strict=True):  # the table's bit (a b c) is the result
        index = [(((x >> s & 1) << 2) | ((y >> s & 1) << 1) | (z >> s & 1)) for s in range(32)]
        wanted = sum((table >> i & 1).astype(np.uint64) << s for s, i in enumerate(index))
        assert np.array_equal(got, wanted.astype(np.uint32))
    for lane in range(32):
        pool = x[lane].tobytes() + y[lane].tobytes()
        for which, selector in enumerate((int(z[lane]) & 0x7777, int(z[lane]) & 0xFFFF, 0x5410, 0x7632)):
            result = bytearray()
            for i in range(4):
                nibble = selector >> 4 * i & 15
                byte = pool[nibble & 7]
                result.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
            assert golden["prmt"][lane, which] == int.from_bytes(result, "little"), (lane, which)


def halves(words: np.ndarray) -> np.ndarray:
    return words.view(np.uint16).view(np.float16).reshape(-1, 2)


def test_half_arithmetic(golden: Vectors) -> None:
    words, _ = inputs()
    x, y, z = (halves(words[i : i + 32]).astype(np.float64) for i in (0, 32, 64))
    with np.errstate(all="ignore"):
        # sums and products of halves, also fused ones, are exact in float128 or round the same way
        exact = (x.astype(np.longdouble) * y + z, x * y, x + y, x - z)
        for which, wanted in enumerate(exact):
            got = halves(np.ascontiguousarray(golden["half2_arithmetic"][:, which]))
            assert np.array_equal(got, wanted.astype(np.float16), equal_nan=True), which
    nans = np.isnan(halves(np.ascontiguousarray(golden["half2_arithmetic"][:, 0])))
    bits = np.ascontiguousarray(golden["half2_arithmetic"][:, 0]).view(np.uint16).reshape(-1, 2)
    assert (bits[nans] == 0x7FFF).all()  # the device's one NaN


def test_approximations(golden: Vectors) -> None:
    lane = np.arange(32)
    got = golden["approximate"].view(np.float32).astype(np.float64)
    x = ((lane - 16).astype(np.float32) * np.float32(0.37)).astype(np.float64)
    assert np.allclose(got[:, 0], 2.0**x, rtol=2.0**-22, atol=0)
    assert not got[:, 1].any()  # below the smallest normal number: flushed
    assert np.allclose(got[:, 2], np.exp(x), rtol=2.0**-22, atol=0)


if __name__ == "__main__":
    head = "# What the emulation prints (tests/cuda/test_ptx.py). Not yet confirmed by a card.\n"
    GOLDEN.write_text(head + emulate(), encoding="utf-8")
    sys.exit(0)
