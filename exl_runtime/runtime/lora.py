"""The LoRA adapters of one runtime: loaded by name, mixed by weight, freed. Knows no tensors."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..errors import UsageError
from ..model.adapter_loading import load_adapter
from ..model.lora import Adapter, Mix, mix_of
from ..model.split_model import SplitTransformer
from ..model.transformer import Transformer

Given: TypeAlias = "Mapping[str, float] | Sequence[str] | str | None"
LIMIT = 100.0  # of a weight; what is far beyond 1 is a mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraInfo:
    """A loaded adapter. weight: in the default mix, 0 where it is not in it; rank: its largest; nbytes: memory."""

    name: str
    path: str
    weight: float
    rank: int
    nbytes: int


class Loras:
    """Names, adapters, and which of them take part when a request does not say."""

    def __init__(self, model: object) -> None:
        self._model = model
        self._loaded: dict[str, tuple[Path, Adapter]] = {}
        self._default: dict[str, float] = {}

    def load(self, path: str | Path, name: str | None) -> str:
        """Load the adapter in a folder; its name, by default that of the folder.

        Raises UsageError for a name in use, AdapterError for an adapter that does not fit, and as `read_adapter`.
        """
        folder = Path(os.path.expanduser(path))
        name = name or folder.resolve().name
        if name in self._loaded:
            raise UsageError(f"there is an adapter {name!r} already", hint="unload it first, or give another name")
        assert isinstance(self._model, Transformer | SplitTransformer)
        self._loaded[name] = folder, load_adapter(folder, self._model)
        return name

    def unload(self, name: str) -> None:
        """Forget an adapter, in the default mix too. Requests that run with it end with it; then its memory is free."""
        self._adapter(name)
        del self._loaded[name]
        self._default.pop(name, None)

    def set(self, given: Given) -> None:
        """The mix of requests that do not say; None or {}: no adapter."""
        weights = self._weights(given)
        for name in weights:
            self._adapter(name)
        self._default = weights

    def mix(self, given: Given) -> Mix:
        """What a request runs with: `given`, the default mix for None. Raises UsageError for names not loaded."""
        weights = self._default if given is None else self._weights(given)
        return mix_of((self._adapter(name), weight) for name, weight in weights.items())

    @property
    def infos(self) -> tuple[LoraInfo, ...]:
        """All adapters, in the order they were loaded."""
        return tuple(
            LoraInfo(
                name=name,
                path=str(folder),
                weight=self._default.get(name, 0.0),
                rank=adapter.rank,
                nbytes=adapter.nbytes,
            )
            for name, (folder, adapter) in tuple(self._loaded.items())
        )

    def clear(self) -> None:
        """Forget everything."""
        self._model = None
        self._loaded, self._default = {}, {}

    def _adapter(self, name: str) -> Adapter:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise UsageError(f"there is no adapter {name!r}; loaded: {known}", hint="load it with load_lora or --lora")
        return self._loaded[name][1]

    @staticmethod
    def _weights(given: Given) -> dict[str, float]:
        if given is None:
            return {}
        if isinstance(given, str):
            given = (given,)
        weights = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
        for name, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not -LIMIT <= weight <= LIMIT:  # NaN is in no range
                raise UsageError(f"the weight of adapter {name!r} is {weight!r}", hint=f"give a number up to {LIMIT:g}")
        return weights
