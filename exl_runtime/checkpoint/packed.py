"""Models as the kernels want them, kept between two starts: repacking is most of the work of loading one.

<folder>/<model>-<path>-<key>.packed   one model; `path` and `key` are hashes
<folder>/<the same>.<process>-<n>      one being written, or what a killed process left

The key is made of what identifies the checkpoint without reading it (reading gigabytes takes as long as packing them):
the path of the folder; name, size, times of modification and change, and the header of every weight file; the
configuration; and the version of the layout. A file whose content is replaced gets another time of change from the
system, which no program can set back.

Files are written after a load by a thread of low priority, if they are worth it and the disk has room, and
appear by one rename. The models used last are kept. Nothing in here can make a load fail: what cannot be read or
written is logged and done without.
"""

import atexit
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..errors import StorageError
from ..files import PARTIAL
from .packed_file import Checksum, Unusable, file_bytes, read, write
from .reader import Checkpoint

log = logging.getLogger(__name__)

SUFFIX = ".packed"
LEAST = 64 << 20  # bytes; smaller models are packed before one notices
MODELS = 3  # kept
FREE_SHARE, FREE_MOST = 10, 50 << 30  # a tenth of the disk stays free, or 50 GiB where that is less
DELAY = 2.0  # seconds before writing begins: the first reply has the machine to itself
LONGEST_EXIT = 10.0  # seconds that the end of the program waits for a file to be finished
STALE = 24 * 3600.0  # seconds after which a half-written file is nobody's


class PackedModel:
    """What is known of one model while it loads. This one keeps nothing: for models that are not kept."""

    def get(self, name: str) -> Tensor | None:
        """uint8: the matrix that an earlier load added under this name; None: there is none."""
        return None

    def add(self, name: str, buffer: Tensor) -> None:
        """A packed matrix (uint8, one dimension, unchanged from now on) for later loads."""

    def keep(self) -> None:
        """Everything was added: write it, in the background."""


NOT_KEPT = PackedModel()


class _FoundModel(PackedModel):
    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = buffers

    def get(self, name: str) -> Tensor | None:
        return self._buffers.get(name)


class _NewModel(PackedModel):
    def __init__(self, cache: "PackedCache", path: Path, key: str) -> None:
        self._cache, self._path, self._key = cache, path, key
        self._buffers: dict[str, Tensor] = {}

    def add(self, name: str, buffer: Tensor) -> None:
        self._buffers[name] = buffer

    def keep(self) -> None:
        buffers, self._buffers = self._buffers, {}
        if file_bytes(buffers) >= self._cache.least:
            _in_background(lambda: self._cache.write(self._path, self._key, buffers))


class PackedFolder:
    """The folder of packed models: what is in it and what has to go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def models(self) -> list[Path]:
        """Whole files, the one used last at the end."""
        found = []
        for path in self._files():
            with suppress(OSError):
                if path.name.endswith(SUFFIX):
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def nbytes(self) -> int:
        """Bytes on the disk, half-written files included."""
        total = 0
        for path in self._files():
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def clear(self) -> int:
        """Remove everything; the bytes freed. Models that are loaded do not mind."""
        freed = self.nbytes()
        for path in self._files():
            with suppress(OSError):
                path.unlink()
        return freed - self.nbytes()

    def _files(self) -> list[Path]:
        with suppress(OSError):
            return [path for path in self.folder.iterdir() if SUFFIX in path.name and path.is_file()]
        return []

    def sweep(self, coming: Path) -> None:
        """Remove other versions of the model that is `coming`, what killed writers left, and models beyond MODELS."""
        same = coming.name.rpartition("-")[0]
        for path in self._files():
            if path.name.endswith(SUFFIX):
                goes = path.name.rpartition("-")[0] == same
            else:
                goes = time.time() - path.stat().st_mtime > STALE or not _alive(path)
            if goes:
                path.unlink(missing_ok=True)
        models = self.models()
        for path in models[: max(0, len(models) - MODELS + 1)]:
            path.unlink(missing_ok=True)

    def make_room(self, needed: int) -> bool:
        """Whether there is room, after removing the models not used for longest where that helps."""
        models = self.models()
        while True:
            disk = shutil.disk_usage(self.folder)
            if disk.free - needed >= min(disk.total // FREE_SHARE, FREE_MOST):
                return True
            if not models:
                return False
            models.pop(0).unlink(missing_ok=True)


class PackedCache(PackedFolder):
    """The packed models of one version of the program.

    checksum  of packed_file.Checksum
    layout    names the bytes that packing makes: the version of the layout, and whatever else changes them
    """

    def __init__(self, folder: Path, *, checksum: Checksum, layout: str, least: int = LEAST) -> None:
        super().__init__(folder)
        self.least = least
        self._checksum = checksum
        self._layout = layout

    def open(self, checkpoint: Checkpoint, configuration: object = None) -> PackedModel:
        """The model of an open checkpoint, read now if it is there and whole; else an empty one to add to.

        configuration  what else decides which tensors are read and how: the folder's declarations, in JSON's types
        """
        if checkpoint.total_bytes < self.least:
            return NOT_KEPT
        place = checkpoint.folder.absolute()
        key = self.key(checkpoint, configuration)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", place.name).strip(".")[:60] or "model"
        path = self.folder / f"{name}-{_short(str(place))}-{key[:16]}{SUFFIX}"
        if not path.exists():
            return _NewModel(self, path, key)
        try:
            buffers = read(path, key, self._checksum)
        except Unusable as err:
            log.warning("%s: %s; the model is packed again", path, err)
            with suppress(OSError):
                path.unlink()
            return _NewModel(self, path, key)
        with suppress(OSError):
            os.utime(path)  # the time of the last use
        return _FoundModel(buffers)

    def key(self, checkpoint: Checkpoint, configuration: object = None) -> str:
        """See the top of the file. Hexadecimal."""
        files = []
        for path in checkpoint.files:
            state = path.stat()
            files.append([path.name, state.st_size, state.st_mtime_ns, state.st_ctime_ns])
        tensors = [
            [name, info.dtype, info.shape, info.file.name, info.start]
            for name in sorted(checkpoint.names)
            for info in (checkpoint.info(name),)
        ]
        identity = [str(checkpoint.folder.absolute()), self._layout, configuration, files, tensors]
        return hashlib.blake2b(json.dumps(identity, default=str).encode(), digest_size=20).hexdigest()

    def write(self, path: Path, key: str, buffers: Mapping[str, Tensor]) -> None:
        """Write a model and remove those that have to go for it. Logs why where that cannot be done."""
        needed = file_bytes(buffers)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.sweep(path)
            if not self.make_room(needed):
                log.info("%s: the disk is too full to keep a packed model of %d bytes", self.folder, needed)
                return
            partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}")
            try:
                write(partial, key, buffers, self._checksum)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, StorageError) as err:
            log.warning("the packed model is not kept: %s", err)


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()


def _alive(partial: Path) -> bool:
    """Whether the process that writes this file runs, as far as its name tells."""
    found = re.search(r"\.(\d+)-\d+(?:" + re.escape(PARTIAL) + r")?$", partial.name)
    try:
        os.kill(int(found[1]) if found else 0, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return found is not None


_writers: set[threading.Thread] = set()
_ending = threading.Event()


def _in_background(work: Callable[[], None]) -> None:
    def run() -> None:
        # Of one thread only, on Linux; elsewhere the whole process has one priority, which stays as it is.
        with suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        _ending.wait(DELAY)
        try:
            work()
        finally:
            _writers.discard(threading.current_thread())

    # Daemon: a slow disk must not hold up the end of the program for longer than LONGEST_EXIT.
    thread = threading.Thread(target=run, name="exl-packed-cache", daemon=True)
    _writers.add(thread)
    thread.start()


@atexit.register
def finish(seconds: float = LONGEST_EXIT) -> bool:
    """Wait for the files being written, which are begun at once; False when the time was not enough."""
    _ending.set()
    end = time.monotonic() + seconds
    with suppress(KeyboardInterrupt):  # the user does not want to wait
        for thread in tuple(_writers):
            thread.join(max(0.0, end - time.monotonic()))
    return not _writers
