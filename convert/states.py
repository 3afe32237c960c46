"""Hidden states of all calibration rows: in memory while they are few, else in a file read and written row by row.

Never mapped into memory: what a process has mapped counts as its own, and a layer needs a few rows at a time only.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime.errors import ConvertError
from exl_runtime.files import naming, sync_folder

ITEM = 4


class States:
    """float32 (rows, length, width). `path` None: held in memory; else the file that holds them, in native order."""

    def __init__(self, shape: tuple[int, int, int], path: Path | None = None, *, existing: bool = False) -> None:
        """existing: open what `path` holds; else make it, with its disk space reserved. Raises ConvertError."""
        self.shape = shape
        self.path = path
        self._memory: Tensor | None = None
        self._descriptor = -1
        if path is None:
            self._memory = torch.empty(shape)
            return
        with naming(path):
            flags = os.O_RDWR | os.O_CLOEXEC | (0 if existing else os.O_CREAT | os.O_TRUNC)
            self._descriptor = os.open(path, flags, 0o666)
            if not existing:
                self._reserve()

    def _reserve(self) -> None:
        """Take the disk space now, while little is lost. Raises OSError, the file is gone then."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, max(1, self.nbytes))
            else:  # macOS: a full disk shows when it is written
                os.ftruncate(self._descriptor, max(1, self.nbytes))
        except OSError:
            self.discard()
            raise

    @property
    def rows(self) -> int:
        """Calibration rows."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return ITEM * self.shape[0] * self.shape[1] * self.shape[2]

    def read(self, start: int, stop: int) -> Tensor:
        """A copy (or, in memory, a view) of rows [start, stop). Raises ConvertError."""
        if self._memory is not None:
            return self._memory[start:stop]
        _, length, width = self.shape
        out = torch.empty(stop - start, length, width)
        target = memoryview(out.numpy()).cast("B")
        place = ITEM * length * width * start
        done = 0
        with naming(self.path):
            while done < len(target):
                count = os.preadv(self._descriptor, [target[done:]], place + done)
                if count == 0:
                    raise ConvertError(
                        f"{self.path}: {os.fstat(self._descriptor).st_size} bytes, {self.nbytes} wanted",
                        hint="the file was cut short; start anew with an empty --work folder",
                    )
                done += count
        return out

    def write(self, start: int, values: Tensor) -> None:
        """Rows from `start` on, any device. Raises ConvertError when the disk refuses."""
        if self._memory is not None:
            self._memory[start : start + values.shape[0]] = values
            return
        data = memoryview(values.detach().float().cpu().contiguous().numpy()).cast("B")
        place = ITEM * self.shape[1] * self.shape[2] * start
        done = 0
        with naming(self.path):
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], place + done)

    def commit(self, path: Path) -> None:
        """Make the file whole on the disk and give it its final name. Only for states in a file."""
        with naming(path):
            os.fsync(self._descriptor)
            os.replace(self.path, path)
            sync_folder(path.parent)
        self.path = path

    def close(self) -> None:
        """Let the memory or the file go; the file stays."""
        self._memory = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        # Behind an error nobody closes: a removed file would keep its disk space as long as the process lives.
        self.close()

    def discard(self) -> None:
        """`close`, and remove the file."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
