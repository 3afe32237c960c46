"""The thread team: everything cpu/threads.h promises, in a small C++ program, and the same team under Python."""

import subprocess
import threading
from pathlib import Path

import pytest
import torch

from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops import native
from ext.toolchain import find_compiler

HERE = Path(__file__).resolve().parent
EXT = HERE.parents[1] / "ext"


def test_the_promises_of_the_header(tmp_path: Path) -> None:
    program = tmp_path / "threads_check"
    command = [find_compiler(None).path, "-O1", "-std=c++17", "-pthread", f"-I{EXT}", "-o", str(program)]
    subprocess.run([*command, str(HERE / "threads_check.cpp"), str(EXT / "cpu" / "threads.cpp")], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def kernels() -> None:
    try:
        native.ensure_loaded()
    except BackendUnavailable as err:
        pytest.skip(str(err))


@pytest.mark.usefixtures("kernels")
def test_python_threads_share_the_team() -> None:
    ops = native.ops()
    before = ops.set_threads(0)
    x = torch.randn(64, 2048)
    wanted = ops.rms_norm(x, torch.ones(2048), 1e-6, 0.0)
    wrong: list[int] = []

    def work() -> None:
        for i in range(200):
            if not torch.equal(ops.rms_norm(x, torch.ones(2048), 1e-6, 0.0), wanted):
                wrong.append(i)

    ops.set_threads(4)
    try:
        callers = [threading.Thread(target=work) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    finally:
        ops.set_threads(before)
    assert not wrong and not any(caller.is_alive() for caller in callers)


@pytest.mark.usefixtures("kernels")
def test_thread_counts_are_checked() -> None:
    before = native.ops().set_threads(0)
    assert before >= 1 and native.ops().set_threads(3) == 3 and native.ops().set_threads(before) == before
    for bad in (-1, 257):
        with pytest.raises(RuntimeError, match="1 to 256 threads"):
            native.ops().set_threads(bad)
    with pytest.raises(RuntimeError, match="repeats must be positive"):
        native.ops().region_cost(0)
