"""The door to the native kernels: the only module that imports `ext`. Importing it costs nothing.

The library is built and loaded when something first asks for it, once per process. Knows no kernel by name.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exl_runtime.errors import BackendUnavailable, UsageError

BACKENDS = ("cpu", "cuda", "reference")
PACKED = "packed"  # of the cache folder, for packed models: ext/cache.py leaves it alone
logger = logging.getLogger(__name__)
_lock = threading.Lock()
_warned = False
_emulating = False

Progress = Callable[[str], None]


class _Library:
    """Built if need be and loaded once per process. A failure is remembered: asking again costs nothing."""

    def __init__(self, load: Callable[[Progress | None], object]) -> None:
        self._load = load
        self.failure: BackendUnavailable | None = None
        self.loaded = False

    def ensure(self, progress: Progress | None = None) -> None:
        if self.loaded:
            return
        with _lock:
            if self.loaded:
                return
            if self.failure is not None:
                raise type(self.failure)(self.failure.problem, hint=self.failure.hint) from self.failure
            try:
                self._load(progress)
            except BackendUnavailable as err:
                self.failure = err
                raise
            self.loaded = True


def _load_cpu(progress: Progress | None) -> None:
    from ext import build

    build.load(progress=progress)


def _load_cuda(progress: Progress | None) -> None:
    from ext import cuda_build

    cuda_build.load_cuda(progress=progress)


_cpu, _cuda = _Library(_load_cpu), _Library(_load_cuda)


class _Operators:
    """`ops().rms_norm(...)`: an operator of the library as torch's C++ overload, looked up once."""

    def __init__(self, namespace: str, ensure: Callable[[], None]) -> None:
        self._namespace, self._ensure = namespace, ensure

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        self._ensure()
        operator = getattr(getattr(torch.ops, self._namespace), name).default
        setattr(self, name, operator)  # found before __getattr__ from now on
        return operator


_operators = _Operators("exl", lambda: ensure_loaded())
_cuda_operators = _Operators("exl_cuda", lambda: ensure_cuda())
_emulated_operators = _Operators("exl_cuda_emulated", lambda: emulate_cuda())


def ops() -> _Operators:
    """The operators of the library as attributes; the first use of one loads the library (see `ensure_loaded`)."""
    return _operators


def loaded() -> bool:
    """Whether the library is in this process already. Never builds."""
    return _cpu.loaded


def ensure_loaded(progress: Progress | None = None) -> None:
    """Build the library if need be and load it. A failure is remembered: asking again costs nothing.

    `progress` is told how a build goes; None writes to standard error. Raises BackendUnavailable (no compiler,
    switched off) or its subclass BuildError.
    """
    _cpu.ensure(progress)


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
    emulated = requested == "cuda" and device.type == "cpu" and _emulating
    if requested is not None and requested != device.type and not emulated:
        raise BackendUnavailable(
            f"the backend {requested!r} cannot run on the device {str(device)!r}",
            hint="use auto or reference",
        )
    if emulated:
        return "cuda"
    if device.type == "cpu":
        if requested is not None:
            ensure_loaded()
            return "cpu"
        why = available()
        if why is None:
            return "cpu"
    elif device.type == "cuda":
        why = cuda_refusal(device)
        if why is None:
            return "cuda"
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
    if _cpu.loaded:
        ops().set_threads(count)


@contextmanager
def torch_alone() -> Iterator[None]:
    """Torch computes on the calling thread only: the native operators bring their own threads, and those of torch would
    spin for the same cores long after the little that torch does between two of them."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


CUDA_CAPABILITY = (8, 0)  # the oldest cards that the kernels are written for: Ampere


def ensure_cuda(progress: Progress | None = None) -> None:
    """Build the CUDA kernels for the cards of this machine if need be, and load them. A failure is remembered.

    `progress` as in `ensure_loaded`. Raises BackendUnavailable (no card, no CUDA compiler) or BuildError.
    """
    _cuda.ensure(progress)


def card_present() -> bool:
    """Whether torch sees an NVIDIA card."""
    return torch.cuda.is_available()


def cuda_ops(device: torch.device) -> _Operators:
    """The operators of the CUDA kernels for tensors on `device`; the first use of one loads their library.

    For a CPU device those of the emulation, after `emulate_cuda`.
    """
    return _cuda_operators if device.type == "cuda" else _emulated_operators


def cuda_refusal(device: torch.device) -> str | None:
    """None if the CUDA kernels can work on `device`, else why not. Builds them if that was not tried yet."""
    if device.type != "cuda":
        return None if _emulating and device.type == "cpu" else f"CUDA kernels need a CUDA device, this is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CUDA_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return f"{name} has compute capability {major}.{minor}; the CUDA kernels need 8.0 (Ampere) or newer"
    try:
        ensure_cuda()
    except BackendUnavailable as err:
        return str(err)
    return None


def emulate_cuda() -> None:
    """For tests: from now on the backend "cuda" also takes the device "cpu", on which its kernels run by emulation.

    Thousands of times slower than a card, and exact about mistakes. Raises BackendUnavailable or BuildError.
    """
    global _emulating
    if _emulating:
        return
    from ext import cuda_build

    cuda_build.load_emulated()
    _emulating = True
