"""One message of a conversation, and what is remembered of how a reply came about. Plain data."""

from dataclasses import dataclass

ROLES = ("user", "assistant")  # the system prompt belongs to the session, not to a turn
CUT_SHORT = ("length", "cancelled", "deadline")  # stop reasons after which a reply can go on token by token


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyMeta:
    """Numbers of one reply: lengths in tokens, times in seconds. `stop_reason` as in `Result`.

    thought_tokens  of generated_tokens were thoughts before the answer
    """

    stop_reason: str
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    seconds_prefill: float
    seconds_decode: float
    dropped_tokens: int = 0
    dropped_turns: int = 0
    thought_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said. `role` is "user" or "assistant"; `meta` is there for replies made in this program."""

    role: str
    content: str
    meta: ReplyMeta | None = None

    @property
    def message(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": self.role, "content": self.content}
