"""What a command gives: lines for people, values for programs."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """text: printed as it is, the protocol included. facts: one JSON object; NaN and infinity become null.

    code: the exit code; 130 when the user ended the work early and this is what there was by then.
    """

    text: str
    facts: Mapping[str, object] = field(default_factory=dict)
    code: int = 0
