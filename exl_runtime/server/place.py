"""What the endpoints share: the model, its settings, the desk, and where errors are told."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from .desk import Desk
from .settings import Settings

NOTE = "exl.note"


@dataclass(slots=True)
class Place:
    """One per server. `report` is told of errors that are not the client's."""

    runtime: Any
    settings: Settings
    desk: Desk
    created: int
    report: Callable[[Exception], None] = field(repr=False)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that are loaded; each can be asked for as a model."""
        names = (info.name for info in getattr(self.runtime, "loras", ()))
        return tuple(name for name in names if name != self.settings.name)

    @classmethod
    def of(cls, request: Request) -> "Place":
        """The place a request came to."""
        return request.app.state.place


def noted(request: Request, counts: dict[str, Any]) -> None:
    """Numbers for the access log."""
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    request.scope.setdefault(NOTE, {})["text"] = (
        f"{counts['prompt_tokens']} tokens in ({cached} cached), {counts['completion_tokens']} out"
    )
