"""Files in the build cache that are made once, by whoever comes first; the others wait for it.

Names say everything that went into a file, so that a second run of the tests makes nothing.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from ext.lock import file_lock

KEEP_DAYS = 14
PATIENCE = 900.0  # seconds for another process's compiler


def kept(target: Path, make: Callable[[Path], object]) -> Path:
    """`target`, which `make` writes under the name it is given unless the file is there. It is whole or absent."""
    if not target.exists():
        with file_lock(target.with_name(f"{target.name}.lock"), timeout=PATIENCE, report=lambda _: None):
            if not target.exists():
                beside = target.with_name(f"{target.name}.part")
                try:
                    make(beside)
                    os.replace(beside, target)
                finally:
                    beside.unlink(missing_ok=True)
    os.utime(target)
    return target


def sweep(folder: Path) -> None:
    """Remove what nobody has asked for in a long time."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if file.is_file() and time.time() - file.stat().st_mtime > KEEP_DAYS * 86400:
                file.unlink()
