"""Builds and loads the CUDA kernels' libraries. See build.py for how a build is found, locked and installed."""

from dataclasses import replace

from exl_runtime.errors import BackendUnavailable
from ext.build import Built, Progress, Settings, load
from ext.cuda_plan import emulated_recipe
from ext.recipe import Recipe
from ext.toolchain import find_compiler, find_torch


def load_cuda(settings: Settings | None = None, progress: Progress | None = None) -> Built:
    """Build the CUDA kernels for the cards of this machine if need be and register their operators with torch."""
    raise BackendUnavailable("there are no native kernels for CUDA in this version")


def load_emulated(settings: Settings | None = None, progress: Progress | None = None) -> Built:
    """Build the emulated library if need be and register its operators with torch: for tests.

    It lies in a folder of its own within the cache, so that it never displaces a library that programs use.
    Raises BackendUnavailable or BuildError.
    """
    chosen = Settings.from_environment() if settings is None else settings
    inner = replace(chosen, cache=chosen.open_cache() / "emulated", disabled=False)
    return load(inner, progress, make=_emulated)


def _emulated(settings: Settings) -> Recipe:
    compiler = find_compiler(settings.compiler, settings.open_cache() / "compilers.json")
    return emulated_recipe(settings.root, compiler, find_torch())
