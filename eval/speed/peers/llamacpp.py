"""llama.cpp through llama-cpp-python's plain bindings: decoding by `llama_decode`, greedy, no tokenizer.

Its settings matter: flash attention on or off, weights repacked for this processor or not, and which is better differs
between prompts and decoding. `prepare` tries them all and takes the best for each, so that nobody is beaten by a
setting.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exl_runtime.errors import EvalError

from ..timers import Timer, wall_timer
from ..workload import Ids, Prompts, Workload, common_length

BATCH = 2048  # tokens of one call, and
MICRO_BATCH = 512  # of one pass: its own defaults
TRIAL_TOKENS = 16
TRIALS = 2
ALL_LAYERS = 999


@dataclass(frozen=True, slots=True)
class Setting:
    """flash: flash attention. repack: weights rearranged at load, where the processor has kernels for that."""

    flash: bool
    repack: bool

    def __str__(self) -> str:
        return f"flash attention {'on' if self.flash else 'off'}, repack {'on' if self.repack else 'off'}"


SETTINGS = tuple(Setting(flash, repack) for repack in (True, False) for flash in (True, False))


class LlamaCpp:
    """See `contestant.Contestant`."""

    name = "llama.cpp"

    def __init__(self, path: Path, device: torch.device, *, timer: Timer | None = None) -> None:
        """Raises EvalError: not installed, too old, or not a model it reads."""
        self._api = _bindings()
        self._timer = timer or wall_timer()
        self._path, self._gpu = path, device.type == "cuda"
        self._quiet = self._api.llama_log_callback(lambda level, text, data: None)  # must outlive its users
        self._api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._api.llama_backend_init()
        self._threads = torch.get_num_threads()
        self._models: dict[bool, Any] = {True: self._open(True)}
        self._contexts: dict[Setting, _Context] = {}
        self._shape = (0, 0)  # of the contexts: tokens, sequences
        self._best: dict[str, Setting] = {}

    def set_threads(self, count: int) -> None:
        """See the protocol."""
        self._threads = count
        for context in self._contexts.values():
            context.set_threads(count)

    def prepare(self, load: Workload, prompts: Prompts) -> None:
        """See the protocol. Tries every setting, then closes what is not needed."""
        shape = (load.context, load.batch)
        if shape != self._shape:
            self._close_contexts()
            self._shape = shape
        seconds: dict[Setting, tuple[float, float]] = {}
        tokens = min(TRIAL_TOKENS, load.generate)
        for setting in SETTINGS:
            context = self._context(setting)
            context.cold(prompts.cold)
            cold = min(self._timer(lambda c=context: c.cold(prompts.cold)) for _ in range(TRIALS))
            steps = min(self._steps(context, prompts.deep, tokens) for _ in range(TRIALS))
            seconds[setting] = cold, steps
        self._best = {
            "prompts": min(seconds, key=lambda setting: seconds[setting][0]),
            "decoding": min(seconds, key=lambda setting: seconds[setting][1]),
        }
        for setting in set(self._contexts) - set(self._best.values()):
            self._contexts.pop(setting).close()

    def cold(self, prompts: Sequence[Ids]) -> float:
        """See the protocol."""
        context = self._context(self._best["prompts"])
        return self._timer(lambda: context.cold(prompts))

    def turn(self, prompts: Sequence[Ids]) -> float:
        """See the protocol."""
        context = self._context(self._best["prompts"])
        return self._timer(lambda: context.feed(prompts))

    def decode(self, prompts: Sequence[Ids], tokens: int, *, known: bool) -> float:
        """See the protocol. What the context of the decoding setting does not hold is computed before the clock."""
        return self._steps(self._context(self._best["decoding"]), prompts, tokens)

    def details(self) -> Mapping[str, object]:
        """See the protocol."""
        buffer = ctypes.create_string_buffer(256)
        model = next(iter(self._models.values()))
        self._api.llama_model_desc(model, buffer, len(buffer))
        return {
            "version": f"llama-cpp-python {self._package_version}",
            "build": self._api.llama_print_system_info().decode(errors="replace").strip(),
            "model": buffer.value.decode(errors="replace"),
            "model_bytes": int(self._api.llama_model_size(model)),
            "n_batch": BATCH,
            "n_ubatch": MICRO_BATCH,
            "settings": {phase: str(setting) for phase, setting in self._best.items()},
        }

    def close(self) -> None:
        """See the protocol."""
        self._close_contexts()
        for model in self._models.values():
            self._api.llama_model_free(model)
        self._models.clear()

    @property
    def _package_version(self) -> str:
        import llama_cpp

        return str(llama_cpp.__version__)

    def _steps(self, context: "_Context", prompts: Sequence[Ids], tokens: int) -> float:
        context.feed(prompts)
        return self._timer(lambda: context.steps(tokens))

    def _close_contexts(self) -> None:
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()

    def _context(self, setting: Setting) -> "_Context":
        if setting not in self._contexts:
            if setting.repack not in self._models:
                self._models[setting.repack] = self._open(setting.repack)
            model = self._models[setting.repack]
            self._contexts[setting] = _Context(self._api, model, setting, *self._shape, self._threads, gpu=self._gpu)
        return self._contexts[setting]

    def _open(self, repack: bool) -> Any:
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = ALL_LAYERS if self._gpu else 0
        params.use_extra_bufts = repack
        model = self._api.llama_model_load_from_file(str(self._path).encode(), params)
        if not model:
            raise EvalError(f"{self._path}: llama.cpp cannot open it", hint="is it a complete GGUF file?")
        return model


class _Context:
    """One `llama_context`: keys and values of some sequences, and what they are of."""

    def __init__(
        self, api: Any, model: Any, setting: Setting, length: int, sequences: int, threads: int, *, gpu: bool
    ) -> None:
        self._api = api
        params = api.llama_context_default_params()
        each = -(-length // 256) * 256
        params.n_ctx, params.n_seq_max = each * sequences, sequences
        params.n_batch, params.n_ubatch = max(BATCH, sequences), max(MICRO_BATCH, sequences)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED if setting.flash else _FLASH_OFF
        params.offload_kqv = gpu
        params.no_perf = True
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise EvalError(f"llama.cpp makes no context of {params.n_ctx} tokens ({setting})")
        self._memory = api.llama_get_memory(self._context)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(params.n_batch, 0, 1)
        self._size = params.n_batch
        fields = (("token", np.int32), ("pos", np.int32), ("n_seq_id", np.int32), ("logits", np.int8))
        self._rows = {
            name: np.ctypeslib.as_array(getattr(self._batch, name), (self._size,)).view(dtype) for name, dtype in fields
        }
        self._rows["n_seq_id"][:] = 1
        self._held: list[Ids] = [()] * sequences
        self._next: list[int] = [0] * sequences

    def set_threads(self, count: int) -> None:
        """For prompts and for decoding."""
        self._api.llama_set_n_threads(self._context, count, count)

    def cold(self, prompts: Sequence[Ids]) -> None:
        """Forget everything, then compute `prompts` and the token after each."""
        self._api.llama_memory_clear(self._memory, False)
        self._held = [()] * len(self._held)
        self.feed(prompts)

    def feed(self, prompts: Sequence[Ids]) -> None:
        """Compute what is not there yet of `prompts`, at least the last token of each, and the token after each."""
        for sequence, ids in enumerate(prompts):
            start = min(common_length(self._held[sequence], ids), len(ids) - 1)
            self._api.llama_memory_seq_rm(self._memory, sequence, start, -1)
            for first in range(start, len(ids), self._size):
                part = ids[first : first + self._size]
                self._run([(token, first + i, sequence) for i, token in enumerate(part)], last_only=True)
            self._held[sequence] = ids
            self._next[sequence] = self._best_of(-1)

    def steps(self, count: int) -> None:
        """`count` tokens more of every sequence, one pass for all of them each."""
        for _ in range(count):
            rows = [(token, len(self._held[s]), s) for s, token in enumerate(self._next)]
            self._run(rows, last_only=False)
            for sequence, token in enumerate(self._next):
                self._held[sequence] = (*self._held[sequence], token)
            self._next = [self._best_of(row) for row in range(len(rows))]

    def close(self) -> None:
        """Free it."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)

    def _run(self, rows: list[tuple[int, int, int]], *, last_only: bool) -> None:
        count = len(rows)
        table = np.asarray(rows, dtype=np.int32)
        self._rows["token"][:count] = table[:, 0]
        self._rows["pos"][:count] = table[:, 1]
        self._rows["logits"][:count] = not last_only
        self._rows["logits"][count - 1] = 1
        for index, (_, _, sequence) in enumerate(rows):
            self._batch.seq_id[index][0] = sequence
        self._batch.n_tokens = count
        if code := self._api.llama_decode(self._context, self._batch):
            raise EvalError(f"llama.cpp fails at a pass over {count} tokens (llama_decode gives {code})")
        self._api.llama_synchronize(self._context)

    def _best_of(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


_FLASH_OFF = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
_NEEDED = ("llama_get_memory", "llama_memory_seq_rm", "llama_set_n_threads", "LLAMA_FLASH_ATTN_TYPE_ENABLED")


def _bindings() -> Any:
    try:
        from llama_cpp import llama_cpp as api
    except ImportError:
        raise EvalError(
            "--peer llama.cpp needs llama-cpp-python",
            hint="pip install llama-cpp-python (it compiles for some minutes), best in an environment of its own",
        ) from None
    except (OSError, RuntimeError) as err:  # its shared library does not load
        raise EvalError(f"llama-cpp-python is installed, but does not load: {str(err).splitlines()[0]}") from err
    if missing := [name for name in _NEEDED if not hasattr(api, name)]:
        raise EvalError(
            f"this llama-cpp-python has no {missing[0]}", hint="pip install -U llama-cpp-python: 0.3.16 or later"
        )
    return api
