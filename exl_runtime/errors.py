"""Every error a user can cause and fix.

The command line prints these as one short message and exits with code 2; any other exception is our bug.
State the value seen, the value wanted, the file or tensor, and (as the hint) the next step.
"""


class ExlError(Exception):
    """Base of all user-facing errors: a problem, and optionally a hint on what to do."""

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        super().__init__(problem if hint is None else f"{problem}\n  hint: {hint}")
        self.problem = problem
        self.hint = hint


class UsageError(ExlError):
    """An argument or setting outside its allowed values."""


class ConfigError(ExlError):
    """config.json (or a sibling JSON file) is missing, unreadable or contradictory."""


class UnsupportedModel(ExlError):
    """The architecture, activation or rope kind is one this runtime does not know."""


class CheckpointError(ExlError):
    """A weight file is missing, truncated, or not what its header says."""


class FormatError(ExlError):
    """The tensors of one matrix do not form a valid EXL2, GPTQ or dense matrix."""


class AdapterError(ExlError):
    """A LoRA adapter is damaged, of a kind this runtime does not know, or made for another model."""


class NonFiniteError(ExlError):
    """NaN or infinity in weights, scales or logits."""


class BackendUnavailable(ExlError):
    """No kernel can run what was asked for on this machine."""


class BuildError(BackendUnavailable):
    """The native extension did not build; the message carries the path of the log."""


class OutOfMemory(ExlError):
    """The model, its cache or a copy of either does not fit."""


class CacheFull(ExlError):
    """No page of the key/value cache is free."""


class PromptTooLong(ExlError):
    """The prompt does not fit into the context."""


class TokenizerError(ExlError):
    """The tokenizer files are missing or unreadable."""


class TemplateError(ExlError):
    """The chat template is missing, invalid, or refused the conversation."""


class NoTemplate(TemplateError):
    """The model has no chat template at all (base models have none): raw text still works."""


class SessionError(ExlError):
    """A saved chat session cannot be read or written."""


class DataError(ExlError):
    """A file of text or of tasks cannot be used: missing, damaged, too short."""


class StorageError(ExlError):
    """A file of results or checkpoints cannot be written, or not be read back."""


class EvalError(ExlError):
    """An evaluation cannot start or go on."""


class ConvertError(ExlError):
    """A conversion job cannot start or go on."""
