"""transformers, for dense models: its own cache, one forward call a token, the dtype the weights are stored in."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl_runtime.errors import EvalError

from ..timers import Timer
from ..workload import Workload
from .stepwise import Stepwise


class Transformers(Stepwise):
    """See `contestant.Contestant`."""

    name = "transformers"

    def __init__(self, path: Path, device: torch.device, *, timer: Timer | None = None) -> None:
        """Raises EvalError: not installed, or a model it cannot open."""
        super().__init__(path, device, timer=timer)
        try:
            import transformers
        except ImportError:
            raise EvalError("--peer transformers needs transformers", hint="pip install transformers") from None
        self._library = transformers
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
        except Exception as err:  # whatever it does not like about a folder
            first = str(err).strip().split("\n")[0][:300]
            raise EvalError(
                f"{path}: transformers cannot open it: {first}", hint="it takes dense models; EXL2 it does not know"
            ) from err
        finally:
            transformers.logging.set_verbosity(level)
            transformers.logging.enable_progress_bar()
        self._model: Any = model.to(device).eval()
        # Renamed in version 5.
        parameters = inspect.signature(self._model.forward).parameters
        self._keyword = "cache" if "cache" in parameters else "past_key_values"
        self._cache: Any = None

    def _restart(self, load: Workload) -> None:
        self._cache = self._library.DynamicCache()

    def _cut(self, length: int) -> None:
        if length == 0:
            self._cache = self._library.DynamicCache()
        elif length < self._cache.get_seq_length():
            self._cache.crop(length - self._cache.get_seq_length())  # below 0: so many leave

    def _forward(self, ids: Tensor) -> Tensor:
        held = {self._keyword: self._cache}
        return self._model(ids, **held, use_cache=True, logits_to_keep=1).logits[:, -1]

    def details(self) -> Mapping[str, object]:
        """See the protocol."""
        return {
            "version": f"transformers {self._library.__version__}, torch {torch.__version__}",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": getattr(self._model.config, "_attn_implementation", "unknown"),
        }

    def close(self) -> None:
        """See the protocol."""
        self._model = self._cache = None
