"""The folder in which a conversion keeps what it has done: found again after any end, compared, cleaned up.

Every file appears under its name only when it is whole (`store`), so what exists is done.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exl_runtime.errors import ConvertError

from .options import JOB_FILE, JobOptions, differences, from_json, to_json
from .states import States
from .store import naming, read_json, remove_partials, write_json

LOCK = ".lock"
VERSION = 1
_OURS = ("measure", "layers", "states", "scratch")  # folders
_FILES = (JOB_FILE, LOCK, "calibration.safetensors", "calibration.json", "measurement.json", "layouts.json", "tuned")
MEMORY_SHARE = 0.2  # of what is free: hidden states larger than this go to the disk


class Workspace:
    """Paths inside the work folder. Use `open_workspace`."""

    def __init__(self, folder: Path, memory: int) -> None:
        self.folder = folder
        self.calibration = folder / "calibration.safetensors"
        self.protocol = folder / "calibration.json"
        self.measurement = folder / "measurement.json"
        self.layouts = folder / "layouts.json"
        self.tuned = folder / "tuned"
        self._memory = int(memory * MEMORY_SHARE)
        self._scratch = 0

    def measured(self, layer: int) -> Path:
        """What one layer's measurement found."""
        return self.folder / "measure" / f"layer-{layer:04d}.json"

    def gradient(self, layer: int) -> Path:
        """Gradient at the inputs of a layer, for the layers below it."""
        return self.folder / "measure" / f"gradient-{layer:04d}.safetensors"

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

    def clear_scratch(self) -> None:
        """Remove what a killed process left behind."""
        for name in ("scratch",):
            with naming(self.folder / name):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """The job is done: remove what it made, and the folder if nothing else is in it."""
        for name in _OURS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in _FILES:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


@contextlib.contextmanager
def open_workspace(folder: Path, options: JobOptions, identity: str, memory: int) -> Iterator[Workspace]:
    """Start or go on with the job in `folder`, alone: a second process is refused.

    Raises ConvertError when the folder holds another job (the differing options are shown), another model, or
    something that is no job at all.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "ab")  # noqa: SIM115 - held as long as the job
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConvertError(
                f"{folder}: another process is working on this job", hint="wait for it, or use another --work"
            ) from None
        _require_same(folder, options, identity)
        workspace = Workspace(folder, memory)
        for name in _OURS:
            with naming(folder / name):
                (folder / name).mkdir(exist_ok=True)
            remove_partials(folder / name)
        remove_partials(folder)
        workspace.clear_scratch()
        yield workspace


def _require_same(folder: Path, options: JobOptions, identity: str) -> None:
    path = folder / JOB_FILE
    record: dict[str, Any] = {"version": VERSION, "model": identity, "options": to_json(options)}
    if not path.exists():
        others = [entry for entry in os.listdir(folder) if entry != LOCK and not entry.endswith(".partial")]
        if others:
            raise ConvertError(
                f"{folder}: not empty and no work folder of a conversion (it holds {sorted(others)[0]})",
                hint="give an empty or new folder with --work",
            )
        write_json(path, record)
        return
    found = read_json(path)
    started = from_json(found.get("options"), where=str(path))
    if changed := differences(started, options):
        raise ConvertError(
            f"{folder}: the job was started with other options: {'; '.join(changed)}",
            hint=f"use the same options to go on, another --work to start anew, or remove {folder}",
        )
    if found.get("model") != identity:
        raise ConvertError(
            f"{folder}: the model in {options.source} is not the one the job was started with",
            hint=f"put that model back, or remove {folder} to start anew",
        )
    if to_json(options) != found.get("options"):
        write_json(path, {**record, "model": identity})
