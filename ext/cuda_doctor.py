"""What `exl doctor` says about NVIDIA cards: driver, torch, compiler, kernels. Builds nothing."""

from pathlib import Path
from typing import Any

from exl_runtime.errors import BackendUnavailable
from ext.build import Settings
from ext.cuda_build import cuda_recipe_for
from ext.cuda_plan import OLDEST
from ext.cuda_tools import find_nvcc
from ext.facts import Check, library_check, output

_SMI = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


def checks(settings: Settings, cache: Path) -> list[Check]:
    """The facts, as many as make sense on this machine."""
    driver = output(_SMI)
    try:
        import torch

        usable, release = torch.cuda.is_available(), torch.version.cuda
    except (ImportError, OSError):
        usable, release = False, None
    if driver is None and not usable:
        return [Check("gpu", None, "no NVIDIA driver found; the CPU is used")]
    found = []
    if driver is not None:
        found.append(Check("gpu", True, "; ".join(line.strip() for line in driver.splitlines() if line.strip())))
    if not usable:
        why = "this torch is a CPU build" if release is None else f"torch (CUDA {release}) cannot use the driver"
        advice = "install a torch with a CUDA version the driver supports"
        return [*found, Check("cuda in torch", False, why, advice)]
    found += [_card(torch, index) for index in range(torch.cuda.device_count())]
    found.append(_nvcc(settings, cache, release or "0"))
    found.append(library_check("cuda kernels", cache, lambda: cuda_recipe_for(settings).key, "in a minute or two"))
    return found


def _card(torch: Any, index: int) -> Check:
    """One card as torch sees it."""
    facts = torch.cuda.get_device_properties(index)
    detail = (
        f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
        f"{facts.multi_processor_count} multiprocessors, {facts.total_memory / 2**30:.1f} GiB"
    )
    good = 10 * facts.major + facts.minor >= OLDEST
    advice = (
        None if good else f"the kernels need compute capability {OLDEST / 10:.1f}; this card runs plain torch, slowly"
    )
    return Check(f"cuda:{index}", good, detail, advice)


def _nvcc(settings: Settings, cache: Path, release: str) -> Check:
    """The compiler that would be used."""
    try:
        nvcc = find_nvcc(release, settings.cuda_home, cache / "nvcc.json")
    except BackendUnavailable as err:
        return Check("nvcc", False, err.problem, err.hint)
    return Check("nvcc", True, f"CUDA {nvcc.release} ({nvcc.path}), torch is for CUDA {release}")
