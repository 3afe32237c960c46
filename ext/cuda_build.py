"""Builds and loads the CUDA kernels' libraries. See build.py for how a build is found, locked and installed."""

import sys
from dataclasses import replace

from exl_runtime.errors import BackendUnavailable
from ext.build import Built, Progress, Settings, load
from ext.cuda_plan import OLDEST, cuda_recipe, emulated_recipe
from ext.cuda_tools import find_nvcc
from ext.recipe import Recipe
from ext.toolchain import find_compiler, find_torch


def load_cuda(settings: Settings | None = None, progress: Progress | None = None) -> Built:
    """Build the CUDA kernels for the cards of this machine if need be and register their operators with torch.

    Raises BackendUnavailable (no card, no CUDA compiler, switched off) or BuildError.
    """
    return load(settings, progress, make=cuda_recipe_for)


def cuda_recipe_for(settings: Settings) -> Recipe:
    """How to build for the cards that torch sees now. Raises BackendUnavailable if this machine cannot."""
    import torch

    _only_on_linux()
    if settings.disabled:
        raise BackendUnavailable("native kernels are switched off by EXL_DISABLE_NATIVE", hint="unset it to use them")
    if torch.version.cuda is None:
        raise BackendUnavailable("this torch is a CPU build", hint="install a torch for CUDA")
    if not torch.cuda.is_available():
        raise BackendUnavailable("torch sees no CUDA device", hint="see what nvidia-smi says about the driver")
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    usable = [(major, minor) for major, minor in capabilities if 10 * major + minor >= OLDEST]
    if not usable:
        have = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        raise BackendUnavailable(f"the CUDA kernels need compute capability 8.0 or newer, this machine has {have}")
    cache = settings.open_cache()
    compiler = find_compiler(settings.compiler, cache / "compilers.json")
    nvcc = find_nvcc(torch.version.cuda, settings.cuda_home, cache / "nvcc.json")
    return cuda_recipe(settings.root, compiler, find_torch(), nvcc, usable)


def load_emulated(settings: Settings | None = None, progress: Progress | None = None) -> Built:
    """Build the emulated library if need be and register its operators with torch: for tests.

    It lies in a folder of its own within the cache, so that it never displaces a library that programs use.
    Raises BackendUnavailable or BuildError.
    """
    chosen = Settings.from_environment() if settings is None else settings
    inner = replace(chosen, cache=chosen.open_cache() / "emulated", disabled=False)
    return load(inner, progress, make=_emulated)


def _only_on_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise BackendUnavailable(f"native kernels are built on Linux only, this is {sys.platform}")


def _emulated(settings: Settings) -> Recipe:
    _only_on_linux()
    compiler = find_compiler(settings.compiler, settings.open_cache() / "compilers.json")
    return emulated_recipe(settings.root, compiler, find_torch())
