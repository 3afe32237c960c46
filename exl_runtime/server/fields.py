"""Reading a request field by field: every value has a type and limits, and an unknown name is an error."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from .problems import ApiError


class Fields:
    """The fields of one JSON object; null means the same as absent. Every method raises ApiError naming the field."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._where = where
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """The raw value; None when absent."""
        self._known.append(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        return value if value is None else self._of_type(name, value, str, "a text")

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name)
        return default if value is None else self._of_type(name, value, bool, "true or false")

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"must be a whole number from {low} to {high}", value)
        return value

    def seconds(self, name: str) -> float | None:
        """A number above 0."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.wrong(name, "must be a number of seconds above 0", value)
        return float(value)

    def integer(self, name: str, default: int) -> int:
        """A whole number of any sign and a sane size."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not abs(value) < 2**31:
            raise self.wrong(name, "must be a whole number", value)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(name, f"must be a number from {low:g} to {high:g}", value)
        return float(value)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """One of a few words."""
        value = self.take(name)
        if value is None:
            return default
        if value not in allowed:
            raise self.wrong(name, f"must be one of {', '.join(allowed)}", value)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty when absent."""
        value = self.take(name)
        return {} if value is None else self._of_type(name, value, dict, "an object")

    def items(self, name: str) -> list[Any]:
        """A list; empty when absent."""
        value = self.take(name)
        return [] if value is None else self._of_type(name, value, list, "a list")

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """A text, or a list of texts, none of them empty."""
        value = self.take(name)
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise self.wrong(name, "must be a text or a list of texts, none of them empty", value)
        if len(texts) > most:
            raise ApiError(400, f"{self._where}{name} has {len(texts)} entries, at most {most} are allowed", param=name)
        return tuple(texts)

    def wholes(self, name: str, most: int) -> tuple[int, ...]:
        """A list of whole numbers from 0; empty when absent."""
        values = self.items(name)
        if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
            raise self.wrong(name, "must be a list of whole numbers from 0", values)
        if len(values) > most:
            raise ApiError(
                400, f"{self._where}{name} has {len(values)} entries, at most {most} are allowed", param=name
            )
        return tuple(values)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing here."""
        for name in names:
            self.take(name)

    def refuse(self, name: str, why: str, *harmless: Any) -> None:
        """A field this server cannot honour, unless its value asks for nothing."""
        value = self.take(name)
        if value is not None and value not in harmless:
            raise ApiError(400, f"{self._where}{name}: {why}", param=name, code="unsupported_parameter")

    def done(self) -> None:
        """Nothing may be left: what nobody asked for would be silently without effect."""
        for name in self._left:
            near = get_close_matches(name, self._known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ApiError(400, f"unknown field {self._where}{name!s:.80}{hint}", param=name, code="unknown_parameter")

    def wrong(self, name: str, what: str, value: Any) -> ApiError:
        """The error about a value."""
        return ApiError(400, f"{self._where}{name} {what}, not {value!r:.80}", param=name)

    def _of_type(self, name: str, value: Any, kind: type, what: str) -> Any:
        if not isinstance(value, kind):
            raise self.wrong(name, f"must be {what}", value)
        return value
