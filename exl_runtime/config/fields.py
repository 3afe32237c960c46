"""Typed access to one JSON object of a configuration: each key is read once, with its type and its range.

Knows no keys by name and no families. A key that is absent and a key that is null mean the same ("use the default")
unless the caller asks `is_null` first.
"""

import math
from collections.abc import Mapping
from reprlib import Repr

from typing_extensions import Self

from ..errors import ConfigError

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
DAMAGED = "the file is incomplete or edited by hand; take it from the model's page again"


def shown(value: object) -> str:
    """A value as it may appear in a message: short whatever was in the file, JSON's spelling where it differs."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _SHORT.repr(value)


class Fields:
    """One JSON object and the text that leads to it in messages ("config.json", "config.json: rope_scaling")."""

    __slots__ = ("values", "where")

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """True when the key is there and not null."""
        return self.values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """True when the key is there and null: for the few keys where null is an answer of its own."""
        return key in self.values and self.values[key] is None

    def error(self, key: str, wanted: str) -> ConfigError:
        """The error for a value that is not what the key may hold."""
        return ConfigError(f'{self.where}: "{key}" must be {wanted}, is {shown(self.values.get(key))}', hint=DAMAGED)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """An integer in [low, high]; without `default` the key is required. true, 4.0 and "4" are no integers."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`, as a float; without `default` the key is required."""
        value = self._value(key, default)
        number = _finite(value)
        if number is None or number <= above:
            raise self.error(key, f"a finite number greater than {above:g}")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string that is not empty; without `default` the key is required."""
        value = self._value(key, default)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a text")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of exactly `count` finite numbers greater than 0."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != count:
            size = f", is a list of {len(value)}" if isinstance(value, list) else f", is {shown(value)}"
            raise ConfigError(f'{self.where}: "{key}" must be a list of {count} numbers{size}', hint=DAMAGED)
        numbers = tuple(_finite(item) for item in value)
        if any(item is None or item <= 0 for item in numbers):
            raise self.error(key, f"a list of {count} finite numbers greater than 0")
        return tuple(item for item in numbers if item is not None)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty when the key is absent."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of texts")
        return tuple(value)

    def integers(self, key: str, *, low: int, high: int) -> tuple[int, ...]:
        """An integer or a list of integers, each in [low, high]; empty when the key is absent."""
        value = self._value(key, [])
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise self.error(key, f"an integer from {low} to {high}, or a list of such")
        return tuple(items)

    def child(self, key: str) -> Self | None:
        """The object under `key`; None when it is absent, null or empty."""
        value = self._value(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return type(self)(value, f"{self.where}: {key}") if value else None

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f'{self.where}: "{key}" is missing', hint=DAMAGED)
        return value


def _finite(value: object) -> float | None:
    """`value` as a finite float, or None. A JSON integer may be too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
