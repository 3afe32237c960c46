"""Runs code of a model in a process of its own: `python -I`, an empty folder, no network, and limits of time, memory
and output.

Where the kernel gives user namespaces to this user (Linux), the process has no network device, sees every disk but its
folder as read-only, and takes its own children with it when it ends. Where it does not, sockets, processes and files
outside its folder are refused inside Python only, which careless code respects and hostile code can get around:
`isolation()` tells. Neither is a wall against an attacker: files stay readable. Put a model that you distrust into a
virtual machine or a container.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CONFINED = Path(__file__).resolve().parent / "confined.py"
SECONDS = 10.0
MEMORY = 512 * 2**20  # bytes of address space
OUTPUT = 2**20  # bytes of what it prints, and of each file
_SHOWN = 200  # characters of a reason
# Libraries of linear algebra start threads when they are imported, and threads are not allowed.
_ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """seconds: wall-clock time, start included. memory: bytes of address space. output: bytes, printed or per file."""

    seconds: float = SECONDS
    memory: int = MEMORY
    output: int = OUTPUT

    def __str__(self) -> str:
        return f"{self.seconds:g} s, {self.memory // 2**20} MiB of memory, {self.output / 2**20:g} MiB of output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """reason: "passed", "out of time", "out of memory", "too much output", or the last line of what Python said.

    namespaces: see the top of this file.
    """

    passed: bool
    reason: str
    namespaces: bool = False


def run_code(code: str, tests: str, limits: Limits | None = None, *, namespaces: bool = True) -> Verdict:
    """Run `code`, then `tests`, in one namespace: passed when both come to their end without an exception.

    An exit inside `code`, with whatever exit code, is not a pass. Ends the process on every way out, Ctrl-C included.
    namespaces: False leaves out those of the kernel, for tests of what is left then.
    """
    limits = limits or Limits()
    # Only this text in the result pipe means "passed": the code cannot know it before it runs.
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="exl-eval-", ignore_cleanup_errors=True) as folder:
        job = {"code": code, "tests": tests, "token": token, "folder": folder, "namespaces": namespaces}
        job |= {"seconds": limits.seconds, "memory": limits.memory, "output": limits.output}
        reader, writer = os.pipe()
        try:
            output = Path(folder) / "output"
            with open(output, "wb") as printed:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-B", "-X", "utf8", str(CONFINED), str(writer)],
                    stdin=subprocess.PIPE,
                    stdout=printed,
                    stderr=printed,
                    cwd=folder,
                    env={**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                    pass_fds=(writer,),
                    start_new_session=True,
                )
            os.close(writer)
            writer = -1
            timed_out = _wait(process, json.dumps(job).encode(), limits.seconds)
            # All of it: what the process wrote is bounded by the pipe, which nobody emptied before.
            os.set_blocking(reader, False)
            told = b""
            with suppress(BlockingIOError):
                told = os.read(reader, 2**16)
            full = output.stat().st_size >= limits.output
            tail = _last_line(output)
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
    lines = told.decode("ascii", "replace").split("\n")
    spaces = "namespaces" in lines
    if token in lines and not timed_out:
        return Verdict(passed=True, reason="passed", namespaces=spaces)
    return Verdict(passed=False, reason=_reason(process.returncode, timed_out, full, tail), namespaces=spaces)


@cache
def isolation() -> bool:
    """True when namespaces hold what runs here, False when only Python's own hooks do. Runs a line of code to see."""
    return run_code("", "").namespaces


def _wait(process: subprocess.Popen[bytes], job: bytes, seconds: float) -> bool:
    """True when the time was over. The process and all of its group are gone afterwards."""
    try:
        process.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    except BrokenPipeError:  # died before it read its job; its exit code and output say why
        return False
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    return False


def _last_line(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            text = file.read(4096).decode("utf-8", "replace")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")


def _reason(code: int, timed_out: bool, full: bool, tail: str) -> str:
    if timed_out or code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return "out of time"
    if full:
        return "too much output"
    if tail.startswith("MemoryError"):
        return "out of memory"
    if code == 0:
        return "ended before its tests were done"
    if tail:
        return tail[:_SHOWN]
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
