"""What `exl doctor` says about NVIDIA cards."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ext import cuda_doctor
from ext.build import Settings
from ext.cuda_build import cuda_recipe_for
from ext.cuda_doctor import checks
from ext.facts import Check


def facts(tmp_path: Path) -> dict[str, Check]:
    return {check.name: check for check in checks(Settings(cache=tmp_path, cuda_home=str(tmp_path)), tmp_path)}


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_doctor, "output", lambda command: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert facts(tmp_path) == {"gpu": Check("gpu", None, "no NVIDIA driver found; the CPU is used")}


def test_a_torch_that_cannot_use_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_doctor, "output", lambda command: "NVIDIA H200, 580.95, 143771 MiB\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for release, why in ((None, "CPU build"), ("13.0", "cannot use the driver")):
        monkeypatch.setattr(torch.version, "cuda", release)
        found = facts(tmp_path)
        assert found["gpu"].ok and found["cuda in torch"].ok is False and why in found["cuda in torch"].detail


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    card = SimpleNamespace(
        name="NVIDIA X", major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=141 << 30
    )
    monkeypatch.setattr(cuda_doctor, "output", lambda command: None)  # as in some containers: no nvidia-smi
    monkeypatch.setattr(torch.version, "cuda", "94.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    found = facts(tmp_path)
    assert found["cuda:0"].ok == (capability >= (8, 0))
    assert "132 multiprocessors, 141.0 GiB" in found["cuda:0"].detail
    assert found["nvcc"].ok is False and "pip install" in (found["nvcc"].advice or "")
    assert found["cuda kernels"].ok is False and "cannot be built" in found["cuda kernels"].detail
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 94.0, compute_80, compute_90\n")
    nvcc.chmod(0o755)
    found = facts(tmp_path)
    assert found["nvcc"].ok and "CUDA 94.0" in found["nvcc"].detail
    if capability < (8, 0):
        return
    assert found["cuda kernels"].ok is None and "not built yet" in found["cuda kernels"].detail
    key = cuda_recipe_for(Settings(cache=tmp_path, cuda_home=str(tmp_path))).key
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"{key}.log").write_text("error")
    assert facts(tmp_path)["cuda kernels"].ok is False
