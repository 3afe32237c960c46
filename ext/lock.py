"""One lock file between processes, held by the operating system: it is free the moment its owner dies.

Knows nothing of builds. Who holds the lock is written into the file, for messages only; it decides nothing.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from exl_runtime.errors import BuildError

POLL_SECONDS = 0.1
REPORT_SECONDS = 2.0


def _try_lock(descriptor: int) -> bool:
    """Take the lock without waiting; False when another process has it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a byte beyond the text, so that others can still read the owner
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def owner(path: Path) -> str:
    """ "process 123" for the process that last took the lock, or a vague word if the file does not say."""
    try:
        pid = path.read_text(encoding="ascii", errors="replace").split()[0]
    except (OSError, IndexError):
        return "another process"
    return f"process {pid}" if pid.isdigit() else "another process"


def held(path: Path) -> bool:
    """Whether some process holds the lock right now."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)  # closing gives the lock back


@contextlib.contextmanager
def file_lock(path: Path, *, timeout: float, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock at `path`; the file itself stays, since removing it would let two owners in.

    While another process holds it, `report` is told who and for how long, every few seconds. Raises BuildError after
    `timeout` seconds, or when the file cannot be opened or the file system cannot lock.
    """
    started = time.monotonic()
    next_report = started
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # not inherited by child processes
    except OSError as err:
        raise BuildError(f"cannot open the lock file {path}: {err.strerror}") from err
    try:
        while True:
            try:
                if _try_lock(descriptor):
                    break
            except OSError as err:
                raise BuildError(
                    f"the file system of {path} cannot lock files: {err.strerror}",
                    hint="set EXL_CACHE_DIR to a folder on a local disk",
                ) from err
            now = time.monotonic()
            if now - started >= timeout:
                raise BuildError(
                    f"{owner(path)} has held {path} for the {timeout:.0f} s that this process was willing to wait",
                    hint="let it finish, or end it; the lock frees itself when its process ends",
                )
            if now >= next_report:
                report(f"waiting for {owner(path)}, which is building ({now - started:.0f} s)")
                next_report = now + REPORT_SECONDS
            time.sleep(POLL_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0) if hasattr(os, "pwrite") else None
        yield
    finally:
        os.close(descriptor)
