"""exllamav2 on a GPU, the model called directly: prompts, then one token at a time, fp16 cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl_runtime.errors import EvalError

from ..timers import Timer
from ..workload import Workload
from .stepwise import Stepwise


class ExLlama(Stepwise):
    """See `contestant.Contestant`."""

    name = "exllamav2"

    def __init__(self, path: Path, device: torch.device, *, timer: Timer | None = None) -> None:
        """Raises EvalError: no GPU, not installed, or a model it cannot open."""
        super().__init__(path, device, timer=timer)
        if device.type != "cuda":
            raise EvalError("--peer exllamav2 runs on an NVIDIA GPU only", hint="compare with llama.cpp on a CPU")
        try:
            import exllamav2
        except Exception as err:  # it builds its extension when imported, and that fails in many ways
            raise EvalError(
                f"--peer exllamav2 needs exllamav2: {str(err).strip().splitlines()[0][:200]}",
                hint="pip install exllamav2; it needs the CUDA toolkit that torch was built with",
            ) from None
        self._library = exllamav2
        self._config = exllamav2.ExLlamaV2Config(str(path))
        self._model: Any = None
        self._cache: Any = None
        self._room = (0, 0)

    def _restart(self, load: Workload) -> None:
        room = (-(-load.context // 256) * 256, load.batch)
        if room == self._room:
            self._cut(0)
            return
        self.close()
        self._config.max_seq_len, self._config.max_batch_size = room
        self._model = self._library.ExLlamaV2(self._config)
        self._cache = self._library.ExLlamaV2Cache(self._model, max_seq_len=room[0], batch_size=room[1], lazy=True)
        self._model.load_autosplit(self._cache)
        self._room = room

    def _cut(self, length: int) -> None:
        self._cache.current_seq_len = length

    def _forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            self._model.forward(ids[:, :-1], self._cache, preprocess_only=True)
        return self._model.forward(ids[:, -1:], self._cache)[:, -1]

    def details(self) -> Mapping[str, object]:
        """See the protocol."""
        import importlib.util

        return {
            "version": f"exllamav2 {getattr(self._library, '__version__', 'unknown')}, torch {torch.__version__}",
            "device": torch.cuda.get_device_name(self._device),
            "flash-attn": importlib.util.find_spec("flash_attn") is not None,
        }

    def close(self) -> None:
        """See the protocol."""
        if self._model is not None:
            self._model.unload()
        self._model = self._cache = None
        self._room = (0, 0)
