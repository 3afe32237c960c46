"""Named sampling settings: those that come with the program, and those the user saved. Knows no terminal."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..console.terminal import clean_line, state_dir
from ..errors import SessionError, UsageError
from ..sampling.params import SamplingParams
from . import history
from .settings import ReplySettings

OWN = ("seed", "logit_bias", "banned_tokens", "allowed_tokens", "logprobs")  # about a task or a model, not a style
BUILT_IN: dict[str, tuple[str, SamplingParams]] = {
    "balanced": ("the default", SamplingParams()),
    "greedy": ("always the best token", SamplingParams(temperature=0.0, min_p=0.0)),
    "precise": ("facts and code", SamplingParams(temperature=0.3, min_p=0.1)),
    "creative": (
        "stories: bold, without the obvious",
        SamplingParams(temperature=1.1, xtc_probability=0.5, min_p=0.02),
    ),
    "fresh": ("no going round in circles", SamplingParams(dry_multiplier=0.8, repetition_penalty=1.05)),
}


def presets_path() -> Path:
    """Where the user's presets lie."""
    return state_dir() / "presets.json"


def saved() -> dict[str, SamplingParams]:
    """The user's presets. Raises SessionError for a file that is not one."""
    path = presets_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as err:
        raise SessionError(f"cannot read {clean_line(str(path))}: {err}") from err
    try:
        entries = json.loads(text)
        return {name: ReplySettings.from_json({"sampling": values}).sampling for name, values in entries.items()}
    except (ValueError, AttributeError, TypeError, UsageError, RecursionError) as err:
        raise SessionError(
            f"{clean_line(str(path))} does not hold presets: {clean_line(str(err))}", hint="mend or remove it"
        ) from err


def find(name: str) -> SamplingParams:
    """The preset called `name`; the user's come first. Raises UsageError, SessionError."""
    own = saved()
    if name in own:
        return own[name]
    if name in BUILT_IN:
        return BUILT_IN[name][1]
    raise UsageError(
        f"there is no preset {name!r:.60}", hint=f"there are {', '.join(dict.fromkeys([*own, *BUILT_IN]))}"
    )


def apply(name: str, sampling: SamplingParams) -> SamplingParams:
    """The preset, with what of `sampling` is about the task: seed, bans and biases. Raises UsageError, SessionError."""
    return replace(find(name), **{entry: getattr(sampling, entry) for entry in OWN})


def save(name: str, sampling: SamplingParams) -> None:
    """Keep `sampling` under `name`, without what is about the task. Raises UsageError, SessionError."""
    if not name.isidentifier() and not name.replace("-", "_").isidentifier():
        raise UsageError(f"{name!r:.60} is no name for a preset", hint="one word of letters, digits, - and _")
    default = SamplingParams()
    _write(saved() | {name: replace(sampling, **{entry: getattr(default, entry) for entry in OWN})})


def delete(name: str) -> None:
    """Forget one of the user's presets. Raises UsageError, SessionError."""
    own = saved()
    if name not in own:
        raise UsageError(f"you have no preset {name!r:.60}", hint=f"you have {', '.join(own) or 'none'}")
    _write({known: params for known, params in own.items() if known != name})


def _write(presets: Mapping[str, SamplingParams]) -> None:
    plain: dict[str, Any] = {
        name: ReplySettings(sampling=params).to_json()["sampling"] for name, params in presets.items()
    }
    text = json.dumps(plain, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    history.write_private(presets_path(), text.encode("utf-8", "replace"))
