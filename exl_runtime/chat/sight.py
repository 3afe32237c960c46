"""Which messages the model no longer sees, for people. A window that moves on knows tokens; turns are found here."""

from .session import ChatSession
from .turn import Turn


def newly_unseen(session: ChatSession, forgotten: int, gone: int) -> tuple[Turn, ...]:
    """The messages to name after a reply: those that left for it, or that a window has left behind altogether and that
    were not named before. forgotten: how many had left before it; gone: tokens that have left behind the first ones."""
    if session.settings.overflow != "window":
        return session.forgotten[forgotten:]
    out = _behind(session, gone)
    named, session.named = min(session.named, out), out
    return session.turns[named:out]


def _behind(session: ChatSession, gone: int) -> int:
    """The number of messages at the beginning of which no token is in sight, whole turns."""
    runtime, messages, args = session.runtime, session.messages, session.template_args
    first = len(messages) - len(session.turns)
    ends = [place for place, message in enumerate(messages) if message["role"] == "user" and place > first]

    def tokens(count: int) -> int:
        return len(runtime.render(messages[:count], add_generation_prompt=False, template_args=args).ids)

    whole = runtime.render(messages, add_generation_prompt=False, template_args=args).ids
    edge = runtime.head(messages, whole, template_args=args) + gone
    low, high = 0, len(ends)  # so many turns are out of sight
    while low < high:
        middle = (low + high + 1) // 2
        if tokens(ends[middle - 1]) <= edge:
            low = middle
        else:
            high = middle - 1
    return ends[low - 1] - first if low else 0
