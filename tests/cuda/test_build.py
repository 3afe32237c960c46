"""The build driver for CUDA: which compiler, which architectures, what it says when something is missing."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops import native
from ext import cuda_build
from ext.build import Built, Settings, build
from ext.cuda_plan import architectures, cuda_recipe
from ext.cuda_tools import Nvcc, find_nvcc
from ext.recipe import NINJA, Recipe
from ext.toolchain import find_compiler, find_torch

NVCC = Nvcc(path="/opt/nvcc", release="13.0", targets=(75, 80, 86, 89, 90, 100, 120), root="/opt", identity="x")

FAKE = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
  --dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;
esac
"""


def fake_nvcc(root: Path, release: str) -> str:
    program = root / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(FAKE.format(release=release, root=root))
    program.chmod(0o755)
    return str(program)


def test_machine_code_for_the_cards_that_are_there() -> None:
    assert architectures([(9, 0), (8, 6), (8, 6)], NVCC) == (
        "arch=compute_86,code=sm_86",
        "arch=compute_90,code=sm_90",
    )
    # newer than the compiler: portable code of the newest kind it knows
    assert architectures([(13, 0)], NVCC) == ("arch=compute_120,code=compute_120",)


def test_the_nvcc_of_torchs_version_is_chosen(tmp_path: Path) -> None:
    old, new = fake_nvcc(tmp_path / "old", "12.8"), fake_nvcc(tmp_path / "new", "13.1")
    memo = tmp_path / "memo.json"
    found = find_nvcc("13.0", memo=memo, among=[old, new])
    assert (found.path, found.release, found.targets) == (new, "13.1", (80, 90))
    assert Path(found.root) == (tmp_path / "new").resolve()
    assert find_nvcc("12.6", memo=memo, among=[old, new]).path == old
    for program in (old, new):  # unchanged programs are not asked twice
        stamp = os.stat(program)
        Path(program).write_text(Path(program).read_text().replace("release 1", "release 9"))
        os.utime(program, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert find_nvcc("13.0", memo=memo, among=[old, new]) == found
    Path(new).write_text(Path(new).read_text() + "\n")
    with pytest.raises(BackendUnavailable, match=r"CUDA 93\.1"):
        find_nvcc("13.0", memo=memo, among=[new])
    memo.write_text('[{"path": 1}]')
    assert find_nvcc("92.0", memo=memo, among=[old]).release == "92.8"


def test_what_is_missing_is_said_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no CUDA compiler") as none:
        find_nvcc("13.0", among=[str(tmp_path / "nvcc")])
    assert "pip install 'nvidia-cuda-nvcc==13.0.*'" in (none.value.hint or "")
    with pytest.raises(BackendUnavailable, match="no CUDA compiler") as none:
        find_nvcc("12.8", among=[])
    assert none.value.hint == "install the CUDA 12 toolkit"
    old = fake_nvcc(tmp_path, "12.8")
    with pytest.raises(BackendUnavailable, match=r"built for CUDA 13\.0, but .* others: .*nvcc \(CUDA 12\.8\)"):
        find_nvcc("13.0", among=[old])
    Path(old).write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BackendUnavailable, match="does not answer"):
        find_nvcc("13.0", among=[old])


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for CUDA 13.0 that sees two cards."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: [(8, 9), (7, 5)][index])


@pytest.mark.usefixtures("cards")
def test_a_recipe_for_these_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(cache=tmp_path / "cache", cuda_home=str(tmp_path))
    fake_nvcc(tmp_path, "13.0")
    text = cuda_build.cuda_recipe_for(settings).files[NINJA]
    assert "-gencode arch=compute_80,code=compute_80" in text  # the fake compiler knows 8.0 and 9.0 only
    assert text.count("-gencode") == 1  # nothing for the card that is too old
    other = cuda_build.cuda_recipe_for(settings).key
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    assert cuda_build.cuda_recipe_for(settings).key != other
    with pytest.raises(BackendUnavailable, match="EXL_DISABLE_NATIVE"):
        cuda_build.cuda_recipe_for(replace(settings, disabled=True))
    monkeypatch.setattr("ext.cuda_build.sys.platform", "win32")
    with pytest.raises(BackendUnavailable, match="Linux only, this is win32"):
        cuda_build.cuda_recipe_for(settings)


def test_machines_without_a_usable_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(cache=tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnavailable, match="CPU build"):
        cuda_build.cuda_recipe_for(settings)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        cuda_build.cuda_recipe_for(settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (7, 5))
    with pytest.raises(BackendUnavailable, match=r"8\.0 or newer, this machine has 7\.5"):
        cuda_build.cuda_recipe_for(settings)


def test_the_backend_of_a_card(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(native, "_warned", False)
    monkeypatch.setattr(native, "cuda_refusal", lambda device: None)
    assert native.resolve_backend(None, device) == native.resolve_backend("cuda", device) == "cuda"
    monkeypatch.setattr(native, "cuda_refusal", lambda device: "no CUDA compiler (nvcc) found")
    assert native.resolve_backend(None, device) == native.resolve_backend(None, device) == "reference"
    assert [record.message for record in caplog.records] == [
        "running without native kernels, which is slow: no CUDA compiler (nvcc) found"
    ]
    with pytest.raises(BackendUnavailable, match="no CUDA compiler"):
        native.resolve_backend("cuda", device)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    assert (
        native.cuda_refusal(device)
        == "Tesla T4 has compute capability 7.5; the CUDA kernels need 8.0 (Ampere) or newer"
    )
    assert "need a CUDA device" in (native.cuda_refusal(torch.device("meta")) or "")


def test_a_failed_build_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(progress: object = None) -> None:
        calls.append(progress)
        raise BackendUnavailable("no CUDA compiler", hint="install one")

    monkeypatch.setattr(cuda_build, "load_cuda", fail)
    monkeypatch.setattr(native._cuda, "failure", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for _ in range(2):
        assert native.cuda_refusal(torch.device("cuda")) == "no CUDA compiler\n  hint: install one"
    assert len(calls) == 1


def build_ahead() -> list[Callable[[], object]]:
    return [library_for_cards]


def library_for_cards() -> Built:
    """exl_cuda.so. Raises BackendUnavailable."""
    settings = Settings.from_environment()
    settings = replace(settings, cache=settings.open_cache() / "emulated" / "linked")

    def make(chosen: Settings) -> Recipe:
        nvcc = find_nvcc("13.0", chosen.cuda_home, chosen.open_cache() / "nvcc.json")
        of_the_future = [(99, 0)]  # portable code only: half of the time, and all the same to the linker
        return cuda_recipe(chosen.root, find_compiler(chosen.compiler), find_torch(), nvcc, of_the_future)

    return build(settings, lambda _: None, make=make)


@pytest.mark.slow
def test_the_library_for_cards_links() -> None:
    """Everything that can be known of exl_cuda.so without a card: it builds, and what it leaves to others is theirs."""
    try:
        built = library_for_cards()
    except BackendUnavailable as err:
        if type(err) is not BackendUnavailable:
            raise
        pytest.skip(str(err))
    left = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(built.file)], capture_output=True, text=True, check=True
    )
    names = [line.split(maxsplit=1)[1] for line in left.stdout.splitlines()]
    ours = [name for name in names if name.startswith(("exl", "ptx"))]
    assert not ours and any(name.startswith("aoti_torch_get_current_cuda_stream") for name in names), ours
