"""Bytes from the network: with progress, a time limit and a size limit. Nothing here knows what they mean."""

import http.client
import os
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from exl_runtime.console.progress import Progress
from exl_runtime.errors import DataError

Opener = Callable[..., Any]  # urllib.request.urlopen or a stand-in: opener(request, timeout=seconds) -> response
TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**16
_KIB = 1024


def fetch(url: str, what: str, progress: Progress, *, limit: int, opener: Opener | None = None) -> Iterator[bytes]:
    """The body at `url`, piece by piece, with a bar named after `what`. limit: bytes; more are refused.

    Raises DataError in one line, naming the host: unreachable, refused, cut short, too large, or not asked because
    HF_HUB_OFFLINE is set.
    """
    host = urlsplit(url).netloc
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "on", "true", "yes"):
        raise DataError(f"{host}: not asked, HF_HUB_OFFLINE is set")
    request = urllib.request.Request(url, headers={"User-Agent": "exl-runtime"})
    try:
        with (opener or urllib.request.urlopen)(request, timeout=TIMEOUT) as answer:
            promised = int(answer.headers.get("Content-Length") or 0)
            if promised > limit:
                raise DataError(f"{host}: {promised} bytes, at most {limit} were expected")
            got = 0
            with progress.stage(f"downloading {what}", promised // _KIB, "KiB") as stage:
                while chunk := answer.read(_CHUNK):
                    stage.advance((got + len(chunk)) // _KIB - got // _KIB)
                    got += len(chunk)
                    if got > limit:
                        raise DataError(f"{host}: more than the {limit} bytes that were expected")
                    yield chunk
                if promised and got < promised:
                    raise DataError(f"{host}: the connection ended after {got} of {promised} bytes")
    except (OSError, http.client.HTTPException, ValueError) as err:  # URLError and time-outs are OSErrors
        reason = getattr(err, "reason", None) or err
        code = f"{err.code} " if hasattr(err, "code") else ""
        raise DataError(f"{host}: {code}{' '.join(str(reason).split())[:120] or type(err).__name__}") from err
