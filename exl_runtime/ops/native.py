"""The door to the native kernels: the only module that imports `ext`. Importing it costs nothing.

The library is built and loaded when something first asks for it, once per process. Knows no kernel by name.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from exl_runtime.errors import BackendUnavailable, UsageError

BACKENDS = ("cpu", "cuda", "reference")
PACKED = "packed"  # of the cache folder, for packed models: ext/cache.py leaves it alone
logger = logging.getLogger(__name__)
_lock = threading.Lock()
_failure: BackendUnavailable | None = None
_loaded = False
_warned = False


class _Operators:
    """`ops().rms_norm(...)`: an operator of the library as torch's C++ overload, looked up once."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        ensure_loaded()
        operator = getattr(torch.ops.exl, name).default
        setattr(self, name, operator)  # found before __getattr__ from now on
        return operator


_operators = _Operators()


def ops() -> _Operators:
    """The operators of the library as attributes; the first use of one loads the library (see `ensure_loaded`)."""
    return _operators


def loaded() -> bool:
    """Whether the library is in this process already. Never builds."""
    return _loaded


def ensure_loaded(progress: Callable[[str], None] | None = None) -> None:
    """Build the library if need be and load it. A failure is remembered: asking again costs nothing.

    `progress` is told how a build goes; None writes to standard error. Raises BackendUnavailable (no compiler,
    switched off) or its subclass BuildError.
    """
    global _failure, _loaded
    if _loaded:
        return
    with _lock:
        if _loaded:
            return
        if _failure is not None:
            raise type(_failure)(_failure.problem, hint=_failure.hint) from _failure
        from ext import build

        try:
            build.load(progress=progress)
        except BackendUnavailable as err:
            _failure = err
            raise
        _loaded = True


def available() -> str | None:
    """None if the native kernels can be used, else why not. Builds them if that was not tried yet."""
    try:
        ensure_loaded()
    except BackendUnavailable as err:
        return str(err)
    return None


def resolve_backend(requested: str | None, device: torch.device) -> str:
    """The backend for `device`: "cpu", "cuda" or "reference" (plain torch, any device).

    A backend asked for by name is used or refused with BackendUnavailable. With None, the native one, or the reference
    with one logged warning where that cannot be had.
    """
    global _warned
    if requested == "reference":
        return "reference"
    if requested is not None and requested not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {requested!r}", hint=f"choose one of {', '.join(BACKENDS)}")
    if requested is not None and requested != device.type:
        raise BackendUnavailable(
            f"the backend {requested!r} cannot run on the device {str(device)!r}",
            hint="use auto or reference",
        )
    if device.type == "cpu":
        if requested is not None:
            ensure_loaded()
            return "cpu"
        why = available()
        if why is None:
            return "cpu"
    elif device.type == "cuda":
        why = "there are no native kernels for CUDA in this version"
        if requested is not None:
            raise BackendUnavailable(why, hint="use the backend 'reference', or the CPU")
    else:
        why = f"there are no native kernels for {device.type}"
    if not _warned:
        _warned = True
        logger.warning("running without native kernels, which is slow: %s", why)
    return "reference"


def set_threads(count: int | None) -> None:
    """CPU threads of the native kernels and of torch, for the whole process; None leaves both as they are.

    Raises UsageError for a count outside 1 to 256.
    """
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 256:
        raise UsageError(f"{count!r} threads", hint="give a number from 1 to 256; the physical cores are a good one")
    torch.set_num_threads(count)
    if _loaded:
        ops().set_threads(count)


def cache_folder() -> Path:
    """The folder of what this program makes for itself and can make again: built libraries, packed models."""
    from ext import build

    return build.Settings.from_environment().open_cache()


def doctor_checks() -> list[Any]:
    """What `exl doctor` shows: a list of `ext.doctor.Check`. Looks, builds nothing."""
    from ext import doctor

    return doctor.checks()


def check(name: str, ok: bool | None, detail: str, advice: str | None = None) -> Any:
    """One more line for `exl doctor`: a `ext.doctor.Check`."""
    from ext import doctor

    return doctor.Check(name, ok, detail, advice)


def clean_cache() -> int:
    """Remove the built library; the bytes freed. Raises BuildError while another process is building."""
    from ext import build

    return build.clean()
