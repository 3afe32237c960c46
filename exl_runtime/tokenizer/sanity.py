"""What a tokenizer.json can do to the library that reads it: panics it prints, texts it blows up. Checked beforehand.

Knows the JSON of the library's stages (normalizer, post-processor, decoder) and nothing of vocabularies.
"""

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import TokenizerError

MAX_GROWTH = 100  # characters out per character in; real files stay below 10
AGAIN = "download the file again"
_CHARSMAP = re.compile(r'"precompiled_charsmap"\s*:\s*"([^"]*)"')


def require_charsmaps(text: str, path: Path) -> None:
    """The tables of sentencepiece normalizers in the text of a tokenizer.json.

    Layout: base64 of a little-endian uint32 (size of a trie in bytes), the trie, and the replacement texts. The
    library panics over any other, which it reports on standard error by itself. Raises TokenizerError.
    """
    for match in _CHARSMAP.finditer(text):
        try:
            raw = base64.b64decode(match[1], validate=True)
        except (binascii.Error, ValueError) as err:
            raise TokenizerError(f"{path}: precompiled_charsmap is not base64: {err}", hint=AGAIN) from err
        size = int.from_bytes(raw[:4], "little")
        if raw and (len(raw) < 4 or size % 4 or 4 + size > len(raw)):
            raise TokenizerError(f"{path}: precompiled_charsmap is cut short ({len(raw)} bytes)", hint=AGAIN)


def require_sane_stages(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Refuse stages that make texts many times longer, and post-processors that name tokens they do not define.

    A few nested replacements turn one letter into gigabytes. Raises TokenizerError.
    """
    for name in ("normalizer", "decoder"):
        stage = getattr(backend, name)
        growth = 1.0 if stage is None else _growth(_state(stage))
        if growth > MAX_GROWTH:
            raise TokenizerError(f"{path}: the {name} makes texts {growth:.3g} times longer (at most {MAX_GROWTH})")
    if backend.post_processor is not None:
        _require_defined(_state(backend.post_processor), path)


def _state(stage: Any) -> dict[str, Any]:
    return json.loads(stage.__getstate__())


def _growth(stage: dict[str, Any]) -> float:
    factor = 1.0
    for inner in [*stage.get("normalizers", ()), *stage.get("decoders", ())]:
        factor *= _growth(inner)
    if stage["type"] == "Replace":
        # A pattern may match a single character, whatever its own length.
        shortest = len(stage["pattern"].get("String", "")) or 1
        factor *= max(1.0, len(stage["content"]) / shortest)
    elif stage["type"] == "Prepend":
        factor *= max(1, len(stage["prepend"]))
    return factor


def _require_defined(stage: dict[str, Any], path: Path) -> None:
    for inner in stage.get("processors", ()):
        _require_defined(inner, path)
    if stage["type"] != "TemplateProcessing":
        return
    for piece in [*stage["single"], *stage["pair"]]:
        token = piece.get("SpecialToken", {}).get("id")
        if token is not None and token not in stage["special_tokens"]:
            raise TokenizerError(f"{path}: the post-processor names the token {token!r:.100}, which it does not define")
