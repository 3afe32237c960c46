"""Commands about the machine: another model, speed, memory."""

import gc
from dataclasses import fields

from ...console.terminal import clean_line
from ...errors import ExlError, UsageError
from .. import memory, status, variables
from .base import Command, Conversation

GROUP = "machine"


def _model(chat: Conversation, rest: str) -> None:
    session = chat.session
    if not rest:
        chat.screen.show(status.start_line(session.runtime.info, memory.free(session.runtime.info.device)))
        return
    if chat.open_model is None:
        raise UsageError("this program has one model only")
    name = rest.strip("\"'")
    memory.check_model(name)  # before the present one is given up
    before = session.runtime.info
    chat.screen.notice(f"closing {clean_line(before.name, 80)}, opening {clean_line(name, 80)} …")
    session.runtime.close()
    # Two models at once may not fit, so the first one goes first, with the cycles that hold its parts: a start
    # freezes what exists, and the collector does not look at that again.
    gc.unfreeze()
    gc.collect()
    memory.give_back()
    try:
        runtime = chat.open_model(name)
    except ExlError as err:
        chat.screen.error(str(err))
        runtime = chat.open_model(before.path)
        chat.screen.notice(f"{clean_line(before.name, 80)} is open again")
    session.use(runtime)
    chat.last = None
    chat.screen.show(status.start_line(runtime.info, memory.free(runtime.info.device)))
    if note := variables.warning(runtime, session.settings.template_args):
        chat.screen.warning(note)


def _stats(chat: Conversation, rest: str) -> None:
    runtime = chat.session.runtime
    rows = [("model", status.start_line(runtime.info, memory.free(runtime.info.device)))]
    for entry in fields(runtime.stats):
        value = getattr(runtime.stats, entry.name)
        if entry.name.endswith("_bytes"):
            value = status.size(value)
        elif isinstance(value, float):
            value = f"{value:.1f}"
        rows.append((entry.name.replace("_", " "), str(value)))
    if (rate := getattr(runtime.stats, "hit_rate", None)) is not None:
        rows.append(("prompt tokens not computed", f"{rate:.0%}"))
    if chat.last is not None:
        rows.append(("last reply", status.status_line(chat.last, runtime.info.context)))
    chat.screen.table(rows)


def _mem(chat: Conversation, rest: str) -> None:
    info = chat.session.runtime.info
    rows = [("weights", status.size(info.weight_bytes)), ("keys and values", status.size(info.cache_bytes))]
    rows += [(name, status.size(number)) for name, number in memory.in_use(info.device)]
    stats = chat.session.runtime.stats
    held, total = getattr(stats, "pages_held", None), getattr(stats, "pages_total", None)
    if total:
        rows.append(("cache pages held", f"{held} of {total}"))
        rows.append(("cache pages reused by others", str(stats.evictions)))
        rows.append(("pages in host memory", status.size(stats.host_cache_bytes)))
    chat.screen.table(rows)


COMMANDS = (
    Command(
        "model", "/model [NAME | FOLDER]", "what is open; or close it, free its memory and open another", GROUP, _model
    ),
    Command("stats", "/stats", "speed, cache and memory", GROUP, _stats),
    Command("mem", "/mem", "what takes how much memory, and what is free", GROUP, _mem),
)
