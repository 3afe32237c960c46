"""The programs of tests/cuda/native: the same kernels plain, under AddressSanitizer + UBSan, and under ThreadSanitizer.

What each mode finds is shown in test_planted.py. A new kernel gets its program as native/NAME.cpp (see check.h).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import cuda_programs as programs
import pytest

NATIVE = Path(__file__).resolve().parent / "native"
DRIVERS = sorted(path for path in NATIVE.glob("*.cpp") if "\n// kernels:" in "\n" + path.read_text(encoding="utf-8"))
ORDERS = {"plain": "6", "asan": "2", "tsan": "2"}


def build_ahead() -> list[Callable[[], object]]:
    return [partial(programs.program, driver, mode) for mode in ("asan", "tsan", "plain") for driver in DRIVERS]


@pytest.mark.parametrize("mode", list(ORDERS))
@pytest.mark.parametrize("driver", DRIVERS, ids=[driver.stem for driver in DRIVERS])
def test_kernels_outside_python(driver: Path, mode: str) -> None:
    done = programs.run(programs.program(driver, mode), ORDERS[mode])
    assert done.returncode == 0 and "PASS" in done.stdout, f"{done.stdout}\n{done.stderr[:6000]}"
