"""One fact about this machine, and the facts of a built library: what the parts of `exl doctor` share."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exl_runtime.errors import ExlError
from ext import cache as caches


@dataclass(frozen=True, slots=True)
class Check:
    """One fact. `ok` is None where there is nothing to judge; `advice` is what to do if it is not ok."""

    name: str
    ok: bool | None
    detail: str
    advice: str | None = None


def library_check(name: str, cache: Path, key_of: Callable[[], str], how_long: str) -> Check:
    """Whether the library whose key `key_of` tells is built, damaged, or failed to build. Builds nothing."""
    try:
        key = key_of()
    except ExlError as err:
        return Check(name, False, f"cannot be built: {err.problem}", err.hint)
    manifest = caches.verified(cache / key)
    if manifest is not None:
        size = f"{manifest.size / 1e6:.1f} MB"
        return Check(name, True, f"built in {manifest.seconds:.0f} s, {size}, {cache / key / manifest.file}")
    log = cache / "logs" / f"{key}.log"
    if (cache / key).exists():
        return Check(name, None, "the built library is damaged; the next start builds it again")
    if log.exists():
        return Check(name, False, f"the last build failed or was interrupted; its log: {log}", "read the log")
    return Check(name, None, f"not built yet for this version; the first start builds them, {how_long}")


def output(command: list[str]) -> str | None:
    """What a helper program prints, or None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
