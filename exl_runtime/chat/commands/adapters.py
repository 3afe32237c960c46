"""The command about LoRA adapters on top of the open model."""

from ...console.terminal import clean_line
from ...errors import UsageError
from .. import status
from .base import Command, Conversation

GROUP = "model"
NONE = ("none", "off")


def _lora(chat: Conversation, rest: str) -> None:
    runtime = chat.session.runtime
    weights = {info.name: info.weight for info in runtime.loras if info.weight}
    if not rest:
        pass
    elif rest.lower() in NONE:
        runtime.set_lora(None)
    elif rest.lower().startswith("drop "):
        runtime.unload_lora(rest[len("drop ") :].strip())
    else:
        place, weight = _place_and_weight(rest)
        known = {info.name for info in runtime.loras}
        name = place if place in known else runtime.load_lora(place)
        runtime.set_lora({**weights, name: weight})
    _show(chat)


def _place_and_weight(rest: str) -> tuple[str, float]:
    """NAME or FOLDER, and the number behind the last blank or = if there is one."""
    for sign in ("=", " "):
        place, found, number = rest.rpartition(sign)
        try:
            weight = float(number)
        except ValueError:
            continue
        if not found:
            raise UsageError(f"{rest!r:.60} is a weight without an adapter", hint="for example /lora FOLDER 0.8")
        return place.strip("\"' ="), weight
    return rest.strip("\"'"), 1.0


def _show(chat: Conversation) -> None:
    loras = chat.session.runtime.loras
    if not loras:
        chat.screen.notice("no adapter is loaded: /lora FOLDER [WEIGHT]")
        return
    rows = [
        (
            clean_line(info.name, 80),
            f"weight {info.weight:g}" if info.weight else "off",
            f"rank {info.rank}, {status.size(info.nbytes)}, {clean_line(info.path, 200)}",
        )
        for info in loras
    ]
    chat.screen.table(rows, title="adapters; what is said from now on is computed with those that are on")


COMMANDS = (
    Command(
        "lora",
        "/lora [FOLDER | NAME [WEIGHT] | none | drop NAME]",
        "LoRA adapters on top of the model: load, weigh, turn off, free",
        GROUP,
        _lora,
    ),
)
