"""The folder of built libraries: where it is, what is whole in it, what can go. Knows no compiler.

<cache>/build.lock           held by the process that builds or cleans
<cache>/compilers.json       versions of compilers already asked
<cache>/<key>/               one finished build: the library and manifest.json; appears by one rename
<cache>/partial-<key>-<pid>/ a build under way, or what a killed one left
<cache>/logs/<key>.log       what the last build of that key said
<cache>/packed/              not of the builds: models packed for the kernels; neither counted nor removed here
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOCK = "build.lock"
MANIFEST = "manifest.json"
PARTIAL = "partial-"
DOOMED = "doomed-"
PACKED = "packed"
KEEP_BUILDS = 6  # finished builds of other sources, compilers or torches; the oldest go
_NAME = "exl_runtime"

logger = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a finished build says about itself; the library is trusted only while it agrees."""

    file: str
    size: int
    sha256: str
    seconds: float
    compiler: str
    torch: str


def open_cache(wanted: Path | None, xdg: str | None) -> Path:
    """The cache folder, created. `wanted` wins over $XDG_CACHE_HOME over ~/.cache.

    Where that cannot be written, a private folder under the system's temporary one, with one warning.
    """
    if wanted is not None:
        folder = Path(os.path.expanduser(wanted))
    elif xdg and os.path.isabs(xdg):
        folder = Path(xdg) / _NAME
    else:
        with contextlib.suppress(RuntimeError):  # no home directory
            return _writable_or_temporary(Path.home() / ".cache" / _NAME)
        folder = Path(os.sep) / "nonexistent" / _NAME
    return _writable_or_temporary(folder)


def _writable_or_temporary(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, probe = tempfile.mkstemp(dir=folder, prefix="probe-")
        os.close(handle)
        os.unlink(probe)
    except OSError as err:
        fallback = _temporary()
        if str(folder) not in _warned:
            _warned.add(str(folder))
            logger.warning("cannot write to the build cache %s (%s); using %s", folder, err.strerror, fallback)
        return fallback
    return folder.resolve()


def _temporary() -> Path:
    """The same folder for all processes of this user, so that they share a build; nobody else may write there."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"{_NAME}-{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        ours = not hasattr(os, "getuid") or state.st_uid == os.getuid()
        if folder.is_dir() and not folder.is_symlink() and ours and state.st_mode & 0o022 == 0:
            return folder
    return Path(tempfile.mkdtemp(prefix=f"{_NAME}-"))


def digest_of(file: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_manifest(folder: Path, library: str, *, seconds: float, compiler: str, torch: str) -> Manifest:
    """Measure the library in `folder` and record it beside."""
    file = folder / library
    manifest = Manifest(
        file=library,
        size=file.stat().st_size,
        sha256=digest_of(file),
        seconds=round(seconds, 2),
        compiler=compiler,
        torch=torch,
    )
    content = {name: getattr(manifest, name) for name in Manifest.__slots__}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return manifest


def verified(folder: Path) -> Manifest | None:
    """The manifest of a finished build whose library is whole; None if it is absent, cut short or altered."""
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        file = folder / manifest.file
        if file.stat().st_size != manifest.size or digest_of(file) != manifest.sha256:
            return None
    except (OSError, ValueError, TypeError):
        return None
    return manifest


def finished_builds(cache: Path) -> Iterator[Path]:
    """Folders of finished builds, whole or not."""
    for folder in cache.iterdir():
        if (folder / MANIFEST).is_file() and not folder.name.startswith((PARTIAL, DOOMED)):
            yield folder


def install(partial: Path, final: Path) -> None:
    """Put a complete folder in place by one rename. Needs the lock."""
    if final.exists():
        discard(final)
    os.rename(partial, final)


def discard(folder: Path) -> None:
    """Remove a folder: first out of sight by a rename, so that nobody meets half of it. Needs the lock."""
    doomed = folder.with_name(f"{DOOMED}{folder.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        os.rename(folder, doomed)
    except OSError:
        doomed = folder
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(cache: Path, keep: str) -> None:
    """Remove what dead builds left, and the oldest finished builds beyond KEEP_BUILDS. Needs the lock."""
    for folder in cache.iterdir():
        if folder.name.startswith((PARTIAL, DOOMED)):
            shutil.rmtree(folder, ignore_errors=True)
    others = sorted((f for f in finished_builds(cache) if f.name != keep), key=lambda f: f.stat().st_mtime)
    for folder in others[: max(0, len(others) - KEEP_BUILDS)]:
        discard(folder)
        with contextlib.suppress(OSError):
            (cache / "logs" / f"{folder.name}.log").unlink()


def size_of(cache: Path) -> int:
    """Bytes in all files of the builds."""
    total = 0
    for folder, folders, files in os.walk(cache):
        if Path(folder) == cache and PACKED in folders:
            folders.remove(PACKED)
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def remove_all(cache: Path) -> int:
    """Remove all builds; returns the bytes freed. Needs the lock, which stays. Loaded libraries stay usable."""
    before = size_of(cache)
    for entry in cache.iterdir():
        if entry.name in (LOCK, PACKED):
            continue
        if entry.is_dir() and not entry.is_symlink():
            discard(entry)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()
    return before - size_of(cache)
