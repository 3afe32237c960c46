"""Memory as the system counts it, and models that could be opened. Knows no conversation."""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

from ..errors import UsageError

DEMO = "demo"


def check_model(name: str) -> None:
    """Look at the files of a model without loading it. Raises ExlError when it cannot be opened."""
    if name == DEMO:
        return
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(f"{name!r:.200} is not a model folder", hint="give a local folder, or demo")
    from ..model.summary import summarize

    summarize(folder)


def models_beside(folder: str) -> list[str]:
    """Models that /model could open: those in the folder around an open one, and the demo."""
    found = []
    with suppress(OSError):
        found = sorted(str(path.parent) for path in Path(folder).resolve().parent.glob("*/config.json"))
    return [DEMO, *(path for path in found if path != str(Path(folder).resolve()))]


def free(device: str) -> int | None:
    """Bytes free for a longer context or another model, on the GPU if the model is on one; None: unknown."""
    numbers = dict(in_use(device))
    return numbers.get("free on the GPU", numbers.get("free on this machine"))


def in_use(device: str) -> list[tuple[str, int]]:
    """(what, bytes): of this process, of the machine, and of the GPU if there is one."""
    rows = []
    own = _lines("/proc/self/status", ("VmRSS", "VmHWM"))
    rows += [(what, own[key]) for key, what in (("VmRSS", "this program"), ("VmHWM", "at most so far")) if key in own]
    machine = _lines("/proc/meminfo", ("MemAvailable", "MemTotal"))
    if "MemAvailable" in machine:
        rows.append(("free on this machine", machine["MemAvailable"]))
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        rows += [("free on the GPU", free), ("of the GPU in all", total)]
    return rows


def give_back() -> None:
    """Hand memory that nothing uses back to the system; allocators keep it otherwise."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _lines(path: str, wanted: tuple[str, ...]) -> dict[str, int]:
    found = {}
    with suppress(OSError, ValueError):
        for line in Path(path).read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in wanted and value.split()[1:] == ["kB"]:
                found[name] = int(value.split()[0]) * 1024
    return found
