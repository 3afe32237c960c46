"""What `sandbox.py` starts, as `python -I confined.py FD`: confines itself, then runs the code it reads from its input.

Standard library only, and nothing of this project: it runs alone.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_NEW_SPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # CLONE_NEW NS, IPC, USER, PID, NET
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # the same number on every architecture
_READ_ONLY = 1
_PR_SET_PDEATHSIG = 1
_CHANGES = frozenset(
    f"os.{name}"
    for name in ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod", "chown", "utime")
)
_REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "pty.",
    "signal.pthread_kill",
    "resource.setrlimit",
    "resource.prlimit",
)


class _Mounting(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


def enter_namespaces(folder: str, size: int) -> bool:
    """No network, no other processes, and nothing writable but `folder` (a disk in memory). False: not here.

    Returns in a child process; the parent waits for it and ends as it ended.
    """
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None)
    if not sys.platform.startswith("linux") or libc.unshare(_NEW_SPACES) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    here = os.fsencode(folder)
    read_only, writable = _Mounting(set=_READ_ONLY), _Mounting(clear=_READ_ONLY)
    done = (
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", here, b"tmpfs", 0, b"size=%d" % size) == 0
        and libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(read_only), 32) == 0
        and libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, here, 0, ctypes.byref(writable), 32) == 0
    )
    os.chdir(folder)
    # The first child is the init of the new process space: when it ends, all in that space end.
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)  # so that whoever waits sees the same end
        os._exit(code if code >= 0 else 128 - code)
    end_with_parent()
    return done


def end_with_parent() -> None:
    """When the process that started this one is killed, this one is too."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def limit(seconds: float, memory: int, output: int) -> None:
    """Hard limits, which this process cannot raise again. No further process or thread can be made."""
    cpu = int(seconds) + 1
    for what, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def refuse(folder: str) -> None:
    """A hook inside Python against network, processes, and changes of files outside `folder`. It cannot be removed."""
    real = os.path.realpath(folder)

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor of a file that was opened already, or no path
        whole = os.path.realpath(os.fsdecode(path))
        return whole != os.devnull and os.path.commonpath((whole, real)) != real

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else False
            if isinstance(flags, int):
                writes = writes or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
            if writes and outside(path):
                raise PermissionError("files outside the working folder cannot be written here")
        elif event in _CHANGES and any(outside(one) for one in arguments):
            raise PermissionError("files outside the working folder cannot be changed here")

    sys.addaudithook(hook)


def main() -> None:
    """Read the job, shut the doors, run, and tell the token when the tests came to their end."""
    result = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    end_with_parent()
    try:
        if job["namespaces"] and enter_namespaces(job["folder"], 16 * job["output"]):
            os.write(result, b"namespaces\n")
    except OSError:
        pass  # half a wall: it is not told as one
    limit(job["seconds"], job["memory"], job["output"])
    token, code, tests = job["token"], job["code"], job["tests"]
    space = {"__name__": "solution"}  # not "__main__": what a module does when it is started is not asked for
    code, tests = compile(code, "solution", "exec"), compile(tests, "tests", "exec")
    refuse(job["folder"])
    exec(code, space)
    exec(tests, space)
    sys.stdout.flush()
    os.write(result, f"{token}\n".encode())


if __name__ == "__main__":
    main()
