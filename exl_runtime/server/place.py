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
