"""The folder in which a conversion keeps what it has done: found again after any end, compared, cleaned up.

Every file appears under its name only when it is whole (`store`), so what exists is done, and what is missing, for
whatever reason, is made again: any part of a work folder is one.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from exl_runtime.errors import ConvertError, ExlError, StorageError
from exl_runtime.files import PARTIAL, naming, read_json, remove_partials, write_json

from .options import JOB_FILE, JobOptions, differences, from_json, to_json
from .states import States

LOCK = ".lock"
VERSION = 1
MEMORY_SHARE, MEMORY_MOST = 0.2, 1 << 30  # of what is free, and in all: larger hidden states go to the disk
_FOLDERS = ("measure", "layers", "states", "tuned", "scratch")
_FILES = ("calibration.json", "calibration.safetensors", "measurement.json", "layouts.json")
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what a lock that somebody else holds looks like


class Workspace:
    """Paths inside the work folder. Use `open_workspace`."""

    def __init__(self, folder: Path, memory: int) -> None:
        self.folder = folder
        self.calibration = folder / "calibration.safetensors"
        self.protocol = folder / "calibration.json"
        self.measurement = folder / "measurement.json"
        self.layouts = folder / "layouts.json"
        self.blocktune = folder / "measure" / "blocktune.json"
        self.tuned = folder / "tuned"
        self._memory = min(int(memory * MEMORY_SHARE), MEMORY_MOST)
        self._scratch = 0

    # --- places -----------------------------------------------------------------------------------------------

    def measured(self, layer: int) -> Path:
        """What one layer's measurement found."""
        return self.folder / "measure" / f"layer-{layer:04d}.json"

    def gradient(self, layer: int) -> Path:
        """Gradient at the inputs of a layer, for the layers below it."""
        return self.folder / "measure" / f"gradient-{layer:04d}.safetensors"

    def fisher(self, layer: int) -> Path:
        """Fisher information at the outputs of a layer."""
        return self.folder / "measure" / f"fisher-{layer:04d}.safetensors"

    def layer(self, layer: int | None) -> Path:
        """The encoded tensors of one layer; None: of the head."""
        return self.folder / "layers" / ("head.safetensors" if layer is None else f"layer-{layer:04d}.safetensors")

    def notes(self, layer: int | None) -> Path:
        """How encoding that layer went."""
        return self.layer(layer).with_suffix(".json")

    def states(self, layer: int, stream: str) -> Path:
        """Hidden states before layer `layer` (its index may be one past the last)."""
        return self.folder / "states" / f"{stream}-{layer:04d}.f32"

    def scratch(self, shape: tuple[int, int, int], copies: int = 8) -> States:
        """Room for hidden states that no checkpoint needs: in memory while `copies` of them fit, else on the disk."""
        if 4 * shape[0] * shape[1] * shape[2] * copies <= self._memory:
            return States(shape)
        self._scratch += 1
        return States(shape, self.folder / "scratch" / f"{self._scratch}.f32")

    # --- what is done -----------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        """The calibration rows exist."""
        return self.protocol.exists() and self.calibration.exists()

    def encoded(self, layer: int | None) -> bool:
        """Layer `layer` (None: the head) is encoded."""
        return self.layer(layer).exists() and self.notes(layer).exists()

    @property
    def begun(self) -> bool:
        """Any work is done that would be lost."""
        if any((self.folder / name).exists() for name in _FILES):
            return True
        files = (path for name in _FOLDERS[:-1] for path in (self.folder / name).glob("*"))
        return any(not path.name.endswith(PARTIAL) for path in files)

    def announce(self, report: Path) -> None:
        """Note that the result, with this report.json in it, is whole and about to get its name."""
        job = self.folder / JOB_FILE
        write_json(job, {**read_json(job), "result": _digest(report)})

    def published(self, out: Path) -> bool:
        """True when an earlier run gave the result its name `out`, and ended before it could clean up."""
        wanted, report = read_json(self.folder / JOB_FILE).get("result"), out / "report.json"
        return wanted is not None and report.is_file() and _digest(report) == wanted

    # --- cleaning up ------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Remove what was not finished, and hidden states that no checkpoint needs. Raises ConvertError."""
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        for folder in (self.folder, *(self.folder / name for name in _FOLDERS)):
            if folder.is_dir():
                remove_partials(folder)

    def remove(self) -> None:
        """The job is done: remove what it made, and the folder if nothing else is in it. What resists stays."""
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (*_FILES, JOB_FILE, LOCK):  # in this order: whatever is left is a job that can go on
            with contextlib.suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


@contextlib.contextmanager
def open_workspace(folder: Path, options: JobOptions, identity: str, memory: int) -> Iterator[Workspace]:
    """Start or go on with the job in `folder`, alone: a second process is refused.

    identity: of the source model;  memory: bytes free on the host. When an error ends the job before anything is done,
    nothing of the folder stays.

    Raises ConvertError when the folder holds another job (the differing options are shown), another model, or
    something that is no job at all.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _require_no_strangers(folder)  # or a lock file would be left in somebody's folder
    with _locked(folder):
        workspace = Workspace(folder, memory)
        ours = not (folder / JOB_FILE).exists()
        try:
            _require_same(workspace, options, identity)
            ours = True
            workspace.tidy()
            for name in _FOLDERS:
                with naming(folder / name):
                    (folder / name).mkdir(exist_ok=True)
            yield workspace
        except ExlError:
            if ours and not workspace.begun:
                workspace.remove()
            raise
        finally:
            with contextlib.suppress(ConvertError):  # the next run tries again
                workspace.tidy()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[bytes]]:
    path = folder / LOCK
    with naming(folder):
        file = open(path, "ab")  # noqa: SIM115 - held as long as the job
    with file:
        take_lock(file.fileno(), folder, "use another --work")
        # The holder before us may have removed the file on its way out: then this lock keeps nobody out.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise _busy(folder, "use another --work")
        yield file


def take_lock(descriptor: int, folder: Path, instead: str) -> None:
    """ConvertError when another process holds the lock of `folder`. File systems without locks are trusted."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in _HELD:
            raise _busy(folder, instead) from None


def _busy(folder: Path, instead: str) -> ConvertError:
    return ConvertError(f"{folder}: another process is working on this job", hint=f"wait for it, or {instead}")


def _require_no_strangers(folder: Path) -> None:
    if (folder / JOB_FILE).exists():
        return
    with naming(folder):
        others = [name for name in os.listdir(folder) if name != LOCK and not name.endswith(PARTIAL)]
    if others:
        raise ConvertError(
            f"{folder}: not empty and no work folder of a conversion (it holds {min(others)})",
            hint="give an empty or new folder with --work",
        )


def _require_same(workspace: Workspace, options: JobOptions, identity: str) -> None:
    folder = workspace.folder
    path = folder / JOB_FILE
    fresh: dict[str, Any] = {"version": VERSION, "model": identity, "options": to_json(options)}
    if not path.exists():
        _require_no_strangers(folder)
        write_json(path, fresh)
        return
    found = _job(path)
    started = from_json(found.get("options"), where=str(path))
    changed = differences(started, options)
    if (changed or found.get("model") != identity) and not workspace.begun and "result" not in found:
        write_json(path, fresh)  # stopped before anything was done: nothing speaks against another job
        return
    if changed:
        raise ConvertError(
            f"{folder}: the job was started with other options: {'; '.join(changed)}",
            hint=f"use the same options to go on, another --work to start anew, or remove {folder}",
        )
    if found.get("model") != identity:
        raise ConvertError(
            f"{folder}: the model in {options.source} is not the one the job was started with",
            hint=f"put that model back, or remove {folder} to start anew",
        )
    if fresh["options"] != found.get("options"):
        write_json(path, {**found, "options": fresh["options"]})


def _job(path: Path) -> dict[str, Any]:
    again = f"use another --work, or remove {path.parent} to start anew"
    try:
        found = read_json(path)
    except StorageError as err:
        raise ConvertError(err.problem, hint=again) from err
    if found.get("version") != VERSION:
        raise ConvertError(f"{path}: the job was started by another version of this program", hint=again)
    return found


def _digest(path: Path) -> str:
    with naming(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
