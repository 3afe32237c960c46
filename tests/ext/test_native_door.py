"""`ops.native` in processes of its own: it loads late, falls back once, and remembers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exl_runtime.ops import native

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


TWICE = """
import torch
from exl_runtime.ops import native
cpu = torch.device("cpu")
print(native.resolve_backend(None, cpu), native.resolve_backend(None, cpu), native.available() is None, native.loaded())
"""


def test_no_compiler_means_reference_with_one_warning(tmp_path: Path) -> None:
    done = run(TWICE, PATH=str(tmp_path), CXX="", EXL_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout.split() == ["reference", "reference", "False", "False"]
    assert done.stderr.count("running without native kernels") == 1
    assert "no C++ compiler" in done.stderr and "hint: install" in done.stderr


def test_a_backend_asked_for_by_name_is_never_replaced(tmp_path: Path) -> None:
    code = """
import sys, torch
import exl_runtime.ops.cpu_small
from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops import native
print("ext.build" in sys.modules)
for name, device in (("cpu", "cpu"), ("cuda", "cpu"), ("tpu", "cpu"), ("cpu", "meta")):
    try:
        print(native.resolve_backend(name, torch.device(device)))
    except BackendUnavailable as err:
        print(name, str(err).splitlines()[0])
print(native.resolve_backend("reference", torch.device("meta")), native.resolve_backend(None, torch.device("meta")))
try:
    native.ops().rms_norm
except BackendUnavailable:
    print("refused")
"""
    done = run(code, EXL_DISABLE_NATIVE="1", EXL_CACHE_DIR=str(tmp_path))
    imported, *lines = done.stdout.splitlines()
    assert imported == "False"  # importing the door and what stands behind it costs nothing
    assert lines[0].startswith("cpu native kernels are switched off")
    assert "cannot run on the device 'cpu'" in lines[1] and "unknown backend 'tpu'" in lines[2]
    assert "cannot run on the device 'meta'" in lines[3]
    assert lines[4] == "reference reference" and lines[5] == "refused"


def test_subnormal_numbers_survive_the_loading() -> None:
    if why := native.available():
        pytest.skip(why)
    tiny = torch.tensor([2.3e-308, 1e-40]).tolist()
    assert sys.float_info.min / 2 > 0 and float(torch.tensor(2e-38) / 4) > 0 and tiny[1] > 0
