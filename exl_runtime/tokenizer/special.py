"""What the JSON files beside a tokenizer say about its special tokens: names, BOS rule, tokens added after training.

Reads `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`; knows no tokenizer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .files import read_optional_json

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredToken:
    """A token the side files declare. `id` None: they name it, without an id. `flags_known` False: only name and id."""

    content: str
    id: int | None = None
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    flags_known: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """`roles`: "bos_token" -> "<s>" and so on, only those that are set. `add_bos` None: the files do not say."""

    roles: dict[str, str] = field(default_factory=dict)
    declared: tuple[DeclaredToken, ...] = ()
    add_bos: bool | None = None
    clean_up_spaces: bool = False
    tokenizer_class: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "SpecialTokens":
        """Raises TokenizerError naming the file and key whose value has the wrong type."""
        config_path = folder / "tokenizer_config.json"
        config = read_optional_json(config_path)
        map_path = folder / "special_tokens_map.json"
        token_map = read_optional_json(map_path)
        added_path = folder / "added_tokens.json"
        added = read_optional_json(added_path)

        roles: dict[str, str] = {}
        named: list[str] = []
        for role in ROLES:  # an explicit null in tokenizer_config.json means "none", whatever the older file says
            path, source = (config_path, config) if role in config else (map_path, token_map)
            if (content := _content(source.get(role), path, role)) is not None:
                roles[role] = content
        for path, source in ((config_path, config), (map_path, token_map)):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                named += _contents(source.get(key), path, key)

        special = {*roles.values(), *named}
        entries = _decoder_entries(config.get("added_tokens_decoder"), config_path, special)
        declared = {token.id: token for token in entries}
        known = {token.content for token in entries}
        for content, index in added.items():
            if not _is_id(index):
                raise TokenizerError(f"{added_path}: the id of {content!r} must be a whole number, not {index!r}")
            if content not in known:
                is_special = content in special
                declared.setdefault(
                    index, DeclaredToken(content=content, id=index, special=is_special, normalized=not is_special)
                )
        known = {token.content for token in declared.values()}
        unnumbered = [content for content in dict.fromkeys([*roles.values(), *named]) if content not in known]
        tokenizer_class = config.get("tokenizer_class")
        return cls(
            roles=roles,
            declared=(
                *(declared[index] for index in sorted(declared)),
                *(DeclaredToken(content=content) for content in unnumbered),
            ),
            add_bos=_flag(config, "add_bos_token", config_path),
            clean_up_spaces=_flag(config, "clean_up_tokenization_spaces", config_path) or False,
            tokenizer_class=tokenizer_class if isinstance(tokenizer_class, str) else None,
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _flag(source: dict[str, Any], key: str, path: Path) -> bool | None:
    value = source.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{path}: {key} must be true or false, not {value!r}")
    return value


def _content(value: Any, path: Path, key: str) -> str | None:
    """A token is written as a plain string or as an object with "content"; null and "" mean none."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise TokenizerError(f"{path}: {key} must be a string or an object with content, not {value!r}")
    return value


def _contents(value: Any, path: Path, key: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        raise TokenizerError(f"{path}: {key} must be a list of tokens, not {type(value).__name__}")
    contents = [_content(item, path, key) for item in value]
    return [content for content in contents if content is not None]


def _decoder_entries(value: Any, path: Path, special: set[str]) -> list[DeclaredToken]:
    if value is None:
        return []
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object, not {type(value).__name__}")
    tokens = []
    for key, entry in value.items():
        content = _content(entry, path, f"added_tokens_decoder[{key}]")
        if not key.isascii() or not key.isdigit() or not _is_id(int(key)) or content is None:
            raise TokenizerError(f"{path}: added_tokens_decoder[{key!r}] needs a token id as key and content")
        flags = entry if isinstance(entry, dict) else {}
        tokens.append(
            DeclaredToken(
                content=content,
                id=int(key),
                special=bool(flags.get("special", False)) or content in special,
                lstrip=bool(flags.get("lstrip", False)),
                rstrip=bool(flags.get("rstrip", False)),
                single_word=bool(flags.get("single_word", False)),
                normalized=bool(flags.get("normalized", False)),
                flags_known=isinstance(entry, dict),
            )
        )
    return tokens
